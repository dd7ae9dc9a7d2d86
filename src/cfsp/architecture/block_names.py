"""Blocks by their numbers: in words, and where others are gone."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def counted(count: int, nouns: str) -> str:
    """Return a number of things in words: `1 block`, `2,000 blocks`."""
    return f"{count:,} {nouns.removesuffix('s') if count == 1 else nouns}"


def blocks_in_words(indices: Iterable[int]) -> str:
    """Return blocks in words: `block 0`, `blocks 1 to 4, 6`."""
    runs: list[list[int]] = []
    ascending = sorted(indices)
    for index in ascending:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    named = (str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
    return f"{'block' if len(ascending) == 1 else 'blocks'} {', '.join(named)}"


def removed_in_words(blocks: Collection[int], attentions: Collection[int]) -> str:
    """Return in words what went whole: blocks, and attention layers of others; empty if nothing."""
    named = [blocks_in_words(blocks)] if blocks else []
    if attentions:
        noun = "attention layer" if len(attentions) == 1 else "attention layers"
        named.append(f"the {noun} of {blocks_in_words(attentions)}")
    return " and ".join(named)


def index_without(removed: Collection[int], block: int) -> int:
    """Return the index of a block that stays when others are gone."""
    return block - sum(other < block for other in removed)

"""What calibration windows are drawn from: the windows of each text, shuffled by seed.

A text that is named twice, or as a part of another one, is one pool: no window is drawn twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from cfsp.errors import TextError, UsageError
from cfsp.settings import DEFAULT_SAMPLES, Text
from cfsp.text.cutting import gather, spans
from cfsp.text.image_windows import ImageWindows, ProcessorOf
from cfsp.text.mixed import parts_of
from cfsp.text.sources import TextSource, identity_of
from cfsp.text.stream import spread_tokens
from cfsp.text.tokenizers import beginning
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.settings import CalibrationText

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShuffledPool:
    """The windows of one text in the order in which they are drawn, and how many are."""

    name: str
    windows: Windows
    share: int


def shuffled_pools(
    text: CalibrationText,
    tokenizer: PreTrainedTokenizerBase,
    processor: ProcessorOf | None = None,
) -> list[ShuffledPool]:
    """Return the pool of each text; arguments and errors are those of `draw_text`."""
    begins_with, samples, seqlen = beginning(tokenizer, text.bos), text.samples, text.seqlen
    if (samples is not None and samples < len(text.names)) or seqlen < 2 + len(begins_with[1:]):
        raise UsageError(
            f"expected at least one window for each text and 2 tokens in a window, "
            f"found {samples} windows for {len(text.names)} texts and {seqlen} tokens"
        )
    wanted = DEFAULT_SAMPLES if samples is None else samples
    generator = torch.Generator().manual_seed(text.seed)
    pools: list[ShuffledPool] = []
    for part, share in parts_with_shares(text.names, wanted):
        source = TextSource(part, "calibration")
        if processor is not None and source.has_images:
            made = ImageWindows(source.samples(), processor(), seqlen, begins_with)
            windows = made.draw(source.name, share, 1 if samples is None else share, generator)
        else:
            stream_R = spread_tokens(source, tokenizer, wanted * seqlen, text.seed)
            all_NT = gather(stream_R, spans(stream_R, seqlen, begins_with), seqlen, begins_with)
            order_N = torch.randperm(len(all_NT), generator=generator)
            windows = Windows(all_NT[order_N], {source.name: len(all_NT)}, begins_with)
        pools.append(ShuffledPool(source.name, windows, share))
    return _filled(pools, samples, seqlen - len(begins_with))


def _filled(pools: Sequence[ShuffledPool], samples: int | None, length: int) -> list[ShuffledPool]:
    """Return pools of which none has a larger share than windows.

    Args:
        pools: with the shares that they should have.
        samples: windows that must be had in all; None for as many as there are.
        length: tokens of a window that are text.

    Raises:
        TextError: a pool is empty, or all hold too few.
    """
    have = [len(pool.windows.tokens_NT) for pool in pools]
    shares = shares_within([pool.share for pool in pools], have)
    enough = samples is None or sum(shares) == samples
    for pool in pools:
        windows, seqlen = pool.windows.tokens_NT.shape
        if windows >= pool.share:
            continue
        if not enough or not windows:
            raise TextError(
                f"{pool.name} holds {windows} windows of {seqlen} tokens, {pool.share} are needed "
                f"({pool.share * length} tokens); give more text, fewer --samples or a shorter "
                "--seqlen"
            )
        if len(pools) > 1:
            logger.warning(
                "%s holds %d windows of %d tokens, fewer than its share of %d; what is missing is "
                "drawn from the other texts, as far as they have it",
                *(pool.name, windows, seqlen, pool.share),
            )
    return [replace(pool, share=share) for pool, share in zip(pools, shares, strict=True)]


def shares_within(shares: Sequence[int], most: Sequence[int]) -> list[int]:
    """Return shares of which none is larger than it can be: the others have more, evenly."""
    found = [min(pair) for pair in zip(shares, most, strict=True)]
    while (missing := sum(shares) - sum(found)) and (
        able := [i for i, share in enumerate(found) if share < most[i]]
    ):
        for i, more in zip(able, _shares(missing, len(able)), strict=True):
            found[i] = min(found[i] + more, most[i])
    return found


def parts_with_shares(texts: Sequence[str | Text], total: int) -> list[tuple[str | Text, int]]:
    """Return what windows are drawn from, each once, and how many of each.

    The kinds of the mixed text are apart.
    """
    found: dict[object, tuple[str | Text, int]] = {}
    for text, share in zip(texts, _shares(total, len(texts)), strict=True):
        parts: Sequence[str | Text] = parts_of(text) if isinstance(text, str) else (text,)
        for part, more in zip(parts, _shares(share, len(parts)), strict=True):
            first, before = found.get(identity_of(part), (part, 0))
            found[identity_of(part)] = first, before + more
    return list(found.values())


def distinct_parts(texts: Sequence[str | Text]) -> list[str | Text]:
    """Return texts, each once, the kinds of the mixed text apart."""
    return [part for part, _ in parts_with_shares(texts, 0)]


def sources_drawn(texts: Sequence[str | Text], samples: int) -> int:
    """Return from how many sources so many windows are drawn; a kind of the mixed text is one."""
    return sum(1 for _, share in parts_with_shares(texts, samples) if share)


def _shares(total: int, parts: int) -> list[int]:
    """Share a number out as evenly as possible."""
    return [total // parts + (i < total % parts) for i in range(parts)]

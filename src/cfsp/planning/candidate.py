"""What goes of a model: whole blocks and attention layers, experts, and a share of channels.

A `Candidate` says how much goes of what; which channels that are, statistics say (`Planner`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from cfsp.architecture.block_names import counted
from cfsp.architecture.found import Unit
from cfsp.calibration.statistics import Removal
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.stored_blocks import (
    parameters_behind_blocks,
    parameters_of_attentions,
    parameters_of_blocks,
)
from cfsp.errors import UsageError
from cfsp.settings import PART_NOUNS, WHOLE_PARTS, Part, WholePart, parts_in_words

Droppable = tuple["WholePart", int]  # a block, or the attention of one, that may be dropped


@dataclass(frozen=True)
class Dropped:
    """Blocks that go whole, and blocks that stay and whose attention layers go; ascending."""

    blocks: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()

    @staticmethod
    def of(removals: Iterable[Removal]) -> Dropped:
        """Return what is gone after some removals."""
        dropped = Dropped()
        for each in removals:
            dropped = dropped.plus((each.part, each.block))
        return dropped

    def plus(self, droppable: Droppable) -> Dropped:
        """Return what is gone when another one goes; with a block its attention is."""
        part, block = droppable
        blocks, attentions = set(self.blocks), set(self.attentions)
        (blocks if part == "blocks" else attentions).add(block)
        return Dropped(tuple(sorted(blocks)), tuple(sorted(attentions - blocks)))

    @property
    def in_words(self) -> str:
        """How many go; empty if none does."""
        numbers: dict[Part, int] = {"blocks": len(self.blocks), "attention": len(self.attentions)}
        return " and ".join(counted(n, PART_NOUNS[part]) for part, n in numbers.items() if n)

    def __len__(self) -> int:
        return len(self.blocks) + len(self.attentions)

    def takes(self, unit: Unit) -> bool:
        """Return whether a unit of the model goes with it."""
        return unit.block in self.blocks or (unit.part == "kv" and unit.block in self.attentions)


NOTHING = Dropped()


@dataclass(frozen=True)
class Candidate:
    """How much goes of what."""

    dropped: Dropped = NOTHING
    experts: int = 0  # routed ones, of every block that has some
    parts: tuple[Part, ...] = ()  # whose channels, or KV groups, go of what stays
    sparsity: float = 0.0  # of what these channels own; without them, of what may go whole

    @property
    def in_words(self) -> str:
        """What goes."""
        words = [self.dropped.in_words] if self.dropped else []
        if self.experts:
            words.append(f"{counted(self.experts, 'experts')} of each block")
        if self.parts and (self.sparsity or not words):
            beside = " of the others" if self.dropped else ""
            words.append(f"{self.sparsity:.1%} of the {parts_in_words(self.parts)}{beside}")
        return " and ".join(words) or "nothing"

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Candidate:
        """Return the candidate that `dataclasses.asdict` made JSON types of."""
        dropped = Dropped(*(tuple(fields["dropped"][key]) for key in ("blocks", "attentions")))
        return Candidate(dropped, fields["experts"], tuple(fields["parts"]), fields["sparsity"])


class Kept(NamedTuple):
    """Units that lose no channel; blocks, and attention layers of blocks, that are not dropped."""

    units: frozenset[int] = frozenset()
    blocks: frozenset[int] = frozenset()
    attentions: frozenset[int] = frozenset()


def kept_by(source: WeightSource, keep: Sequence[str]) -> Kept:
    """Return what stays: numbers are of blocks, other words patterns of modules' names.

    A block of which something stays is not dropped.
    """
    count = source.architecture.block_count
    names = [source.architecture.module_name(unit) for unit in source.units]
    blocks: set[int] = set()
    units: set[int] = set()
    for word in keep:
        if word.isdecimal():
            number = int(word) if len(word) < 10 else count  # Python reads no number of any length
            if number >= count:
                raise UsageError(
                    f"--keep names block {word}, and {source.label} has the blocks 0 to {count - 1}"
                )
            blocks.add(number)
            continue
        found = {index for index, name in enumerate(names) if fnmatchcase(name, word)}
        if not found:
            raise UsageError(
                f"--keep {word} fits no module that could lose something; such are {names[0]} to "
                f"{names[-1]}"
            )
        units |= found
    units |= {index for index, unit in enumerate(source.units) if unit.block in blocks}
    kept = [source.units[index] for index in units]
    attentions = blocks | {unit.block for unit in kept if unit.part == "kv"}
    blocks |= {unit.block for unit in kept}
    return Kept(frozenset(units), frozenset(blocks), frozenset(attentions))


@dataclass(frozen=True)
class DropSizes:
    """The parameters of everything that may be dropped, by its block."""

    block_of: Mapping[int, int]  # with their attention layers; empty where blocks may not go
    attention_of: Mapping[int, int]  # empty where attention layers may not go by themselves
    total: int  # of all blocks, or of all attention layers where blocks may not go
    some_stay: bool = False  # whether some of these were told to
    attentions_stay: bool = False

    @staticmethod
    def of(source: WeightSource, parts: Sequence[WholePart], keep: Sequence[str] = ()) -> DropSizes:
        """Return the sizes of blocks, attention layers, or both, but for what is to stay."""
        blocks = dict(enumerate(parameters_of_blocks(source))) if "blocks" in parts else {}
        attentions = parameters_of_attentions(source) if "attention" in parts else {}
        kept = kept_by(source, keep)
        block_of = {each: size for each, size in blocks.items() if each not in kept.blocks}
        attention_of = {b: size for b, size in attentions.items() if b not in kept.attentions}
        total = sum((blocks or attentions).values())
        attentions_stay = len(attention_of) < len(attentions)
        some_stay = len(block_of) < len(blocks) if blocks else attentions_stay
        return DropSizes(block_of, attention_of, total, some_stay, attentions_stay)

    @property
    def of_one(self) -> Mapping[int, int]:
        """Those of blocks, or of attention layers where blocks may not go."""
        return self.block_of or self.attention_of

    @property
    def most(self) -> int:
        """The parameters of all that may go but the smallest, which stays where no other does."""
        smallest = 0 if self.some_stay else min(self.of_one.values(), default=0)
        return sum(self.of_one.values()) - smallest

    def droppable(self, dropped: Dropped) -> list[Droppable]:
        """Return what may go next, in a definite order."""
        attentions = self.attention_of.keys() - {*dropped.blocks, *dropped.attentions}
        blocks = self.block_of.keys() - {*dropped.blocks}
        return [
            *(("attention", block) for block in sorted(attentions)),
            *(("blocks", block) for block in sorted(blocks)),
        ]

    def leaves_some(self, dropped: Dropped) -> bool:
        """Return whether a block stays, and an attention where these may go by themselves."""
        staying = self.attention_of.keys() - {*dropped.blocks, *dropped.attentions}
        has_block = self.some_stay or len(dropped.blocks) < len(self.block_of)
        has_attention = self.attentions_stay or bool(staying)
        return (has_block or not self.block_of) and (has_attention or not self.attention_of)

    def parameters(self, dropped: Dropped) -> int:
        """Return how many parameters go with blocks and attention layers."""
        blocks = sum(self.block_of[block] for block in dropped.blocks)
        return blocks + sum(self.attention_of[block] for block in dropped.attentions)

    def parameters_with(self, dropped: Dropped, droppable: Droppable) -> int:
        """Return how many more parameters go if another one does."""
        return self.parameters(dropped.plus(droppable)) - self.parameters(dropped)


def parameters_dropped(source: WeightSource, dropped: Dropped) -> int:
    """Return how many parameters go with blocks and attention layers of a model."""
    behind = parameters_behind_blocks(source) if dropped.blocks else 0
    return behind + (DropSizes.of(source, WHOLE_PARTS).parameters(dropped) if dropped else 0)

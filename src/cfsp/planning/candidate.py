"""What goes of a model: whole blocks or attention layers, experts, and a share of channels.

A `Candidate` says how much goes of what; which channels that are, statistics say (`Planner`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from cfsp.architecture.block_names import counted
from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.stored_blocks import (
    parameters_behind_blocks,
    parameters_of_attentions,
    parameters_of_blocks,
)
from cfsp.errors import UsageError
from cfsp.settings import PART_NOUNS, Part, WholePart, parts_in_words


@dataclass(frozen=True)
class Dropped:
    """Blocks that go whole, and blocks that stay and whose attention layers go; ascending.

    Only a plan that somebody wrote has both.
    """

    blocks: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()

    @staticmethod
    def of(part: WholePart, blocks: Iterable[int]) -> Dropped:
        """Return what is gone if blocks go, or their attention layers."""
        chosen = tuple(sorted(blocks))
        return Dropped(chosen) if part == "blocks" else Dropped((), chosen)

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
    """The parameters of every block that may be dropped, or of every attention layer."""

    part: WholePart
    size_of: Mapping[int, int]  # by block; those of blocks with their attention layers
    total: int  # of all, also of those that were told to stay
    some_stay: bool  # whether some were told to

    @staticmethod
    def of(source: WeightSource, part: WholePart, keep: Sequence[str] = ()) -> DropSizes:
        """Return the sizes of blocks, or attention layers, but for what is to stay."""
        kept = kept_by(source, keep)
        every, stay = parameters_of_attentions(source), kept.attentions
        if part == "blocks":
            every, stay = dict(enumerate(parameters_of_blocks(source))), kept.blocks
        size_of = {block: size for block, size in every.items() if block not in stay}
        return DropSizes(part, size_of, sum(every.values()), len(size_of) < len(every))

    @property
    def most(self) -> int:
        """The parameters of all that may go but the smallest, which stays where no other does."""
        smallest = 0 if self.some_stay else min(self.size_of.values(), default=0)
        return sum(self.size_of.values()) - smallest

    def left(self, gone: Collection[int]) -> set[int]:
        """Return what may go next: where no other stays, the last does."""
        left = self.size_of.keys() - {*gone}
        return left if self.some_stay or len(left) > 1 else set()

    def parameters(self, gone: Iterable[int]) -> int:
        """Return how many parameters go with some."""
        return sum(self.size_of[block] for block in gone)


def parameters_dropped(source: WeightSource, dropped: Dropped) -> int:
    """Return how many parameters go with blocks and attention layers of a model."""
    gone = 0
    if dropped.blocks:
        gone += parameters_behind_blocks(source)
        gone += DropSizes.of(source, "blocks").parameters(dropped.blocks)
    if dropped.attentions:
        gone += DropSizes.of(source, "attention").parameters(dropped.attentions)
    return gone

"""Statistics: all that calibration learnt, as a value that can be saved and read.

They are computed once; any criterion, sparsity or target is then planned from them without
another forward pass. What is read is checked, so that a damaged file is told from a calibration.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from cfsp.calibration.observed import (
    BlockStatistics,
    CalibrationRecord,
    ObservedBlock,
    UnitStatistics,
    file_of_facts,
    read_facts,
    units_from,
)
from cfsp.checkpoint.locating import given_path
from cfsp.checkpoint.output import write_atomically
from cfsp.errors import StatisticsError, damage_as
from cfsp.settings import WHOLE_PARTS, Part, WholePart


@dataclass(frozen=True)
class Sensitivity:
    """What pruning one part of each block alone does to the predictions.

    See `cfsp.selection.divergence`. A block that has none of the part loses nothing.
    """

    divergence_L: tuple[float, ...]  # KL(dense || that block's FFNs pruned), in nats per token
    kept_L: tuple[float, ...]  # the share of the channels of the block's FFNs that stayed
    windows: int  # windows that it was measured on
    # The same of other parts by their names, such as `kv`.
    other_parts: dict[str, Sensitivity] = field(default_factory=dict)

    @property
    def halved_L(self) -> list[float]:
        """What removing half of each block would cost, in nats per token.

            KL_l k_l / (1 - k_l),  if removing a share 1 - k costs in proportion to 1/k - 1

        Few channels cannot be halved: of three KV groups two stay, k = 2/3. Where nothing could go,
        nothing is lost.
        """
        pairs = zip(self.divergence_L, self.kept_L, strict=True)
        return [divergence * (k / (1 - k)) if k < 1 else 0.0 for divergence, k in pairs]

    def of_part(self, part: Part) -> Sensitivity | None:
        """Return what pruning one part of each block alone does; None if it was not measured."""
        return self if part == "ffn" else self.other_parts.get(part)

    @staticmethod
    def from_json(fields: Mapping[str, Any] | None, blocks: int) -> Sensitivity | None:
        """Return that of so many blocks, of its fields as JSON; ValueError if it cannot be."""
        if fields is None:
            return None
        divergence_L = tuple(map(float, fields["divergence_L"]))
        kept_L = tuple(map(float, fields["kept_L"]))
        if not (
            len(divergence_L) == len(kept_L) == blocks
            and all(0 <= value < math.inf for value in divergence_L)
            and all(0 < share <= 1 for share in kept_L)
        ):
            raise ValueError(f"the sensitivity of {blocks} blocks is {divergence_L}, kept {kept_L}")
        others = fields["other_parts"].items()
        found = {str(part): Sensitivity.from_json(each, blocks) for part, each in others}
        parts = {part: each for part, each in found.items() if each is not None}
        return Sensitivity(divergence_L, kept_L, int(fields["windows"]), parts)


@dataclass(frozen=True)
class Removal:
    """A block or an attention that goes next, after others (`cfsp.selection.drop_order`)."""

    block: int  # its index, or that of the attention's block
    divergence: float  # KL(dense || without it and those before it), in nats per token
    part: WholePart = "blocks"

    @staticmethod
    def all_from_json(fields: Sequence[Mapping[str, Any]], blocks: int) -> tuple[Removal, ...]:
        """Return those of so many blocks, of their fields as JSON; ValueError if they can't be."""
        found = tuple(
            Removal(int(each["block"]), float(each["divergence"]), each["part"])
            for each in fields
            # Of blocks and attention layers together, as an earlier version measured it.
            if not each.get("among")
        )
        places = {(each.part, each.block) for each in found}
        possible = product(WHOLE_PARTS, range(blocks))
        if len(places) < len(found) or not places <= {*possible}:
            raise ValueError(f"of {blocks} blocks those that go are {sorted(places)}")
        return found


@dataclass(frozen=True)
class RunDistances:
    """How far every run of consecutive blocks turns the hidden state."""

    # [i][j] is the sum over some tokens of the angular distance between what enters block i and
    # what enters block j; the last j stands for what leaves the last block.
    sums: tuple[tuple[float, ...], ...]
    tokens: int

    def between(self, first: int, end: int) -> float:
        """Return the mean distance over the blocks from `first` on, `end` not included."""
        return self.sums[first][end] / self.tokens

    @staticmethod
    def from_json(fields: Mapping[str, Any] | None, blocks: int) -> RunDistances | None:
        """Return the distances over runs of so many blocks."""
        if fields is None:
            return None
        sums = tuple(tuple(float(value) for value in row) for row in fields["sums"])
        if [len(row) for row in sums] != [blocks + 1] * (blocks + 1) or int(fields["tokens"]) < 1:
            raise ValueError(f"the distances over runs are not those of {blocks} blocks")
        if not all(math.isfinite(value) for row in sums for value in row):
            raise ValueError("the distances over runs are NaN or infinite")
        return RunDistances(sums, int(fields["tokens"]))


@dataclass(frozen=True)
class Statistics:
    """Statistics of every block and every unit, and how they were made.

    Attributes:
        blocks: of each block.
        units: of each unit, in the order of blocks.
        record: the conditions.
        sensitivity: of every block; None if it was not measured: it requires the whole model
            in memory.
        removals: which blocks, or which attention layers, go best together, one after the other,
            as far as it was measured, which requires the same.
        runs: how far runs of blocks turn the hidden state; None if it was not measured.
    """

    blocks: tuple[BlockStatistics, ...]
    units: tuple[UnitStatistics, ...]
    record: CalibrationRecord
    sensitivity: Sensitivity | None = None
    removals: tuple[Removal, ...] = ()
    runs: RunDistances | None = None

    @classmethod
    def of(cls, observed: Sequence[ObservedBlock], record: CalibrationRecord) -> Statistics:
        """Return the statistics of a model from those of all its blocks."""
        return cls(
            tuple(each.block for each in observed),
            tuple(unit for each in observed for unit in each.units),
            record,
        )

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.blocks[0].tokens

    @property
    def blocks_with_units(self) -> list[int]:
        """Indices of the blocks that have a unit, ascending."""
        return sorted({unit.block for unit in self.units})

    @property
    def has_one_unit_each(self) -> bool:
        """Whether every block has one unit."""
        return [unit.block for unit in self.units] == list(range(len(self.blocks)))

    def of_part(self, part: Part) -> Statistics:
        """Return the statistics of one part's units, and of the blocks as that part sees them.

        The distances are those over the attention sublayers where they were seen.
        """
        units = tuple(unit for unit in self.units if unit.part == part)
        blocks = list(self.blocks)
        for unit in units:
            if unit.distance_sum is not None:
                blocks[unit.block] = BlockStatistics(unit.distance_sum, unit.tokens)
        sensitivity = self.sensitivity and self.sensitivity.of_part(part)
        return replace(self, blocks=tuple(blocks), units=units, sensitivity=sensitivity)

    def removals_of(self, part: WholePart | None) -> list[Removal]:
        """Return the order in which blocks go, or attention layers."""
        return [each for each in self.removals if each.part == part]

    @property
    def distance_L(self) -> list[float]:
        """The mean angular distance of every block."""
        return [block.distance for block in self.blocks]

    def save(self, path: str | Path) -> None:
        """Write the statistics to one file, atomically.

        Raises:
            OutputError: the place is not writable.
        """
        write_atomically(path, self._file())

    @property
    def digest(self) -> str:
        """SHA-256 over all of them, as hex."""
        return sha256(self._file()).hexdigest()

    def _file(self) -> bytes:
        facts: dict[str, Any] = {
            "record": asdict(self.record),
            "blocks": [asdict(block) for block in self.blocks],
        }
        if self.sensitivity:
            facts["sensitivity"] = asdict(self.sensitivity)
        if self.removals:
            facts["removals"] = [asdict(each) for each in self.removals]
        if self.runs:
            facts["runs"] = asdict(self.runs)
        return file_of_facts(facts, self.units)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read statistics.

        Raises:
            StatisticsError: the file is missing, damaged, or of another version.
        """
        facts, tensors = read_facts(given_path(path))
        with damage_as(StatisticsError, path, "calibrate again"):
            record = CalibrationRecord.from_json(facts["record"])
            blocks = tuple(
                BlockStatistics(each["distance_sum"], each["tokens"]) for each in facts["blocks"]
            )
            count = len(blocks)
            units = units_from(facts, tensors)
            order = [unit.block for unit in units]
            in_order = order == sorted(order) and all(0 <= block < count for block in order)
            if not (blocks and in_order):
                raise ValueError(f"the FFNs of {count} blocks are said to be in blocks {order}")
            found = cls(
                blocks,
                units,
                record,
                Sensitivity.from_json(facts.get("sensitivity"), count),
                Removal.all_from_json(facts.get("removals", ()), count),
                RunDistances.from_json(facts.get("runs"), count),
            )
            wrong = [i for i, block in enumerate(blocks) if not block.is_possible]
            wrong += [unit.block for unit in units if not unit.is_possible]
        if wrong:
            raise StatisticsError(
                f"{path} has NaN, infinite or impossible values in block {min(wrong)}; "
                "calibrate again"
            )
        return found

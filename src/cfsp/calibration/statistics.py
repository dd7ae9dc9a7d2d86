"""Statistics: all that calibration learnt, as a value that can be saved and read.

They are computed once; any criterion, sparsity or target is then planned from them without
another forward pass. How they lie on disk: `statistics_file.py`.

Shapes: E experts, F FFN channels, L blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfsp.settings import Part, WholePart

# Of units whose experts' outputs are not looked at.
NOT_SEEN = torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class BlockStatistics:
    """What the calibration tokens did in one block.

    Attributes:
        distance_sums: sum over tokens of each distance between the block's input and output.
        tokens: number of tokens.
    """

    distance_sums: dict[str, float]
    tokens: int

    @property
    def distances(self) -> dict[str, float]:
        """Mean of each distance over all tokens."""
        return {name: total / self.tokens for name, total in self.distance_sums.items()}


@dataclass(frozen=True)
class UnitStatistics:
    """What the calibration tokens did in one unit.

    Attributes:
        block: index of its block.
        sum_of_squares_F: sum over all tokens of the square of each activation that enters the
            unit's down matrix, float64: of an FFN one for each channel.
        tokens: number of tokens that passed the block.
        routed_E: tokens that were routed to each expert; empty in a unit with one FFN. Channels
            are then numbered through, expert after expert, and sums are over the tokens that
            were routed to the expert, activations weighted as the router weights its output.
        part: what it is a unit of.
        distance_sums: of an attention, sum over tokens of each distance between the hidden state
            before it and that after it; empty where these are not seen.
        output_norm_E: sum over the tokens routed to each expert of the L2 norm of what it adds,
            its output times the router's weight, float64; empty where whole experts can't go.
    """

    block: int
    sum_of_squares_F: Tensor
    tokens: int
    routed_E: tuple[int, ...] = ()
    part: Part = "ffn"
    distance_sums: dict[str, float] = field(default_factory=dict)
    output_norm_E: Tensor = NOT_SEEN

    @property
    def ffns(self) -> int:
        """Number of FFNs: 1, or the number of experts."""
        return len(self.routed_E) or 1

    @property
    def width(self) -> int:
        """Activations that enter the down matrix of one FFN: its channels."""
        return len(self.sum_of_squares_F) // self.ffns

    def of_ffn(self, ffn: int) -> UnitStatistics:
        """Return the statistics of one FFN: its channels, and the tokens that it saw."""
        if not self.routed_E:
            return self
        own = slice(ffn * self.width, (ffn + 1) * self.width)
        return replace(
            self,
            sum_of_squares_F=self.sum_of_squares_F[own],
            tokens=self.routed_E[ffn],
            routed_E=(),
        )

    @property
    def norm_F(self) -> Tensor:
        """L2 norm of each channel over all tokens (X_i in the formulas)."""
        return self.sum_of_squares_F.sqrt()


@dataclass(frozen=True)
class CalibrationRecord:
    """The conditions of a calibration, for the manifest and for refusing what doesn't fit.

    Attributes:
        model: how the user called the model.
        fingerprint: digest of the model.
        sources: text sources and the number of windows from each.
        tokens_digest: SHA-256 of the exact token ids.
        windows: number of windows.
        seqlen: tokens in a window.
        seed: seed of the draw.
        dtype: what the blocks computed in.
        device: where they computed.
        bos: whether every window begins with BOS.
    """

    model: str
    fingerprint: str
    sources: dict[str, int]
    tokens_digest: str
    windows: int
    seqlen: int
    seed: int
    dtype: str
    device: str
    bos: bool


@dataclass(frozen=True)
class Sensitivity:
    """What pruning one part of each block alone does to the predictions.

    See `cfsp.selection.sensitivity`.

    Attributes:
        divergence_L: KL(dense || that block's FFNs pruned), in nats per token; 0 for a block
            that has no FFN.
        kept_L: the share of the channels of the block's FFNs that stayed; 1 where there is none.
        windows: number of windows that it was measured on.
        other_parts: the same of other parts by their names, such as `kv`.
    """

    divergence_L: tuple[float, ...]
    kept_L: tuple[float, ...]
    windows: int
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

    def of_blocks(self, blocks: Sequence[int]) -> Sensitivity:
        """Return that of some of the blocks."""
        return replace(
            self,
            divergence_L=tuple(self.divergence_L[block] for block in blocks),
            kept_L=tuple(self.kept_L[block] for block in blocks),
            other_parts={part: each.of_blocks(blocks) for part, each in self.other_parts.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON types; `statistics_file.sensitivity_from_json` reads them."""
        return asdict(self)


@dataclass(frozen=True)
class Removal:
    """A block or an attention that goes next, after others (`cfsp.selection.drop_order`).

    Attributes:
        block: its index, or that of the attention's block.
        divergence: KL(dense || without it and those before it), in nats per token.
        part: what goes.
        among: the parts that it was chosen among, where these are several.
    """

    block: int
    divergence: float
    part: WholePart = "blocks"
    among: tuple[WholePart, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON types; `statistics_file.removals_from_json` reads them."""
        fields = asdict(self)
        if self.part == "blocks":
            del fields["part"]
        if not self.among:
            del fields["among"]
        return fields


@dataclass(frozen=True)
class RunDistances:
    """How far every run of consecutive blocks turns the hidden state.

    Attributes:
        sums: [i][j] is the sum over some tokens of the angular distance between what enters block
            i and what enters block j; the last j stands for what leaves the last block.
        tokens: number of tokens.
    """

    sums: tuple[tuple[float, ...], ...]
    tokens: int

    def between(self, first: int, end: int) -> float:
        """Return the mean distance over the blocks from `first` on, `end` not included."""
        return self.sums[first][end] / self.tokens


@dataclass(frozen=True)
class ObservedBlock:
    """What calibration gathers in one block.

    Attributes:
        block: the block's own statistics.
        units: those of its FFN units.
        passing: the hidden states of some tokens, as they enter and leave it (2 x S x D); None
            where runs of blocks are not compared.
    """

    block: BlockStatistics
    units: tuple[UnitStatistics, ...]
    passing: Tensor | None = None


@dataclass(frozen=True)
class Statistics:
    """Statistics of every block and every unit, and how they were made.

    Attributes:
        blocks: of each block.
        units: of each unit, in the order of blocks.
        record: the conditions.
        sensitivity: of every block; None if it was not measured: it requires the whole model
            in memory.
        removals: which blocks, which attentions, or which of both go best together, one after the
            other, as far as it was measured, which requires the same.
        runs: how far runs of blocks turn the hidden state; None if it was not measured.
    """

    blocks: tuple[BlockStatistics, ...]
    units: tuple[UnitStatistics, ...]
    record: CalibrationRecord
    sensitivity: Sensitivity | None = None
    removals: tuple[Removal, ...] = ()
    runs: RunDistances | None = None

    @classmethod
    def of(
        cls,
        observed: Sequence[ObservedBlock],
        record: CalibrationRecord,
        sensitivity: Sensitivity | None = None,
    ) -> Statistics:
        """Return the statistics of a model from those of all its blocks."""
        return cls(
            tuple(each.block for each in observed),
            tuple(unit for each in observed for unit in each.units),
            record,
            sensitivity,
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
            if unit.distance_sums:
                blocks[unit.block] = BlockStatistics(unit.distance_sums, unit.tokens)
        sensitivity = self.sensitivity and self.sensitivity.of_part(part)
        return replace(self, blocks=tuple(blocks), units=units, sensitivity=sensitivity)

    def of_units(self, parts: Collection[Part]) -> Statistics:
        """Return the statistics of a model that was opened with fewer parts, by those of units."""
        return replace(self, units=tuple(unit for unit in self.units if unit.part in parts))

    def removals_of(self, parts: Sequence[WholePart]) -> list[Removal]:
        """Return the order in which blocks go, attentions, or both together."""
        among = tuple(parts) if len(parts) > 1 else ()
        return [each for each in self.removals if each.among == among and each.part in parts]

    def without_attentions(self, removed: Collection[int]) -> Statistics:
        """Return the statistics without the attentions of some blocks."""
        units = (unit for unit in self.units if unit.part != "kv" or unit.block not in removed)
        return replace(self, units=tuple(units))

    def without_blocks(self, removed: Collection[int]) -> Statistics:
        """Return the statistics of the blocks that stay, numbered through."""
        staying = [block for block in range(len(self.blocks)) if block not in removed]
        index_of = {block: index for index, block in enumerate(staying)}
        return replace(
            self,
            blocks=tuple(self.blocks[block] for block in staying),
            units=tuple(
                replace(unit, block=index_of[unit.block])
                for unit in self.units
                if unit.block in index_of
            ),
            sensitivity=self.sensitivity and self.sensitivity.of_blocks(staying),
            removals=(),
            runs=None,
        )

    def distances(self, metric: str) -> list[float]:
        """Return one distance for every block."""
        return [block.distances[metric] for block in self.blocks]

    def save(self, path: Path) -> None:
        """Write the statistics to one file, atomically.

        Raises:
            OutputError: the place is not writable.
        """
        from cfsp.calibration.statistics_file import write_statistics

        write_statistics(self, path)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read statistics.

        Raises:
            StatisticsError: the file is missing, damaged, or of another version.
        """
        from cfsp.calibration.statistics_file import read_statistics

        return read_statistics(path)

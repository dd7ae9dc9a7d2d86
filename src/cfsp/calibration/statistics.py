"""Statistics: all that calibration learnt, as a value that can be saved and read.

They are computed once; any criterion, sparsity or target is then planned from them without
another forward pass. On disk: `statistics.safetensors` (per-channel sums) with all else as
JSON in its metadata, so that one file is one calibration.

Shapes: E experts, F FFN channels, L blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import StatisticsError
from cfsp.settings import DISTANCES, UNIT_PARTS, WHOLE_PARTS, Part, WholePart

# Version 1 held means of distances where version 2 holds sums; it is still read. Version 3 is for
# models some of whose blocks have no FFN unit, or several: units are then listed by themselves.
STATISTICS_VERSION = 2
VERSION_WITH_UNITS = 3
_METADATA_KEY = "cfsp_statistics"

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
        sum_F: sum over all tokens of each activation that enters the unit's down matrix, float64:
            of an FFN one for each channel.
        sum_of_squares_F: sum of its squares, float64.
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
    sum_F: Tensor
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
        return len(self.sum_F) // self.ffns

    def of_ffn(self, ffn: int) -> UnitStatistics:
        """Return the statistics of one FFN: its channels, and the tokens that it saw."""
        if not self.routed_E:
            return self
        own = slice(ffn * self.width, (ffn + 1) * self.width)
        return replace(
            self,
            sum_F=self.sum_F[own],
            sum_of_squares_F=self.sum_of_squares_F[own],
            tokens=self.routed_E[ffn],
            routed_E=(),
        )

    @property
    def norm_F(self) -> Tensor:
        """L2 norm of each channel over all tokens (X_i in the formulas)."""
        return self.sum_of_squares_F.sqrt()

    @property
    def mean_F(self) -> Tensor:
        """Mean of each channel."""
        return self.sum_F / self.tokens

    @property
    def variance_F(self) -> Tensor:
        """Population variance of each channel."""
        return (self.sum_of_squares_F / self.tokens - self.mean_F.square()).clamp_min(0.0)


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
    bos: bool = False


@dataclass(frozen=True)
class Sensitivity:
    """What pruning each block alone does to the predictions (`cfsp.whole_model.sensitivity`).

    Attributes:
        divergence_L: KL(dense || that block's FFNs pruned), in nats per token; 0 for a block
            that has no FFN.
        sparsity: fraction of the channels of each of the block's FFNs that was removed.
        windows: number of windows that it was measured on.
        divergence_of: the same of other parts by their names, such as `kv`.
    """

    divergence_L: tuple[float, ...]
    sparsity: float
    windows: int
    divergence_of: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def of_part(self, part: Part) -> Sensitivity | None:
        """Return what pruning one part of each block alone does; None if it was not measured."""
        if part == "ffn":
            return self
        found_L = self.divergence_of.get(part)
        return None if found_L is None else replace(self, divergence_L=found_L)

    def of_blocks(self, blocks: Sequence[int]) -> Sensitivity:
        """Return that of some of the blocks."""
        others = self.divergence_of.items()
        return replace(
            self,
            divergence_L=tuple(self.divergence_L[block] for block in blocks),
            divergence_of={
                part: tuple(divergence_L[block] for block in blocks)
                for part, divergence_L in others
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON types; see `sensitivity_from_json`."""
        fields = asdict(self)
        if not self.divergence_of:
            del fields["divergence_of"]
        return fields


@dataclass(frozen=True)
class Removal:
    """A block or an attention that goes next, after others (`cfsp.whole_model.removal_order`).

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
        """Return JSON types; see `removals_from_json`."""
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
        units = [_entry_of(unit) for unit in self.units]
        blocks: list[dict[str, Any]]
        if self.has_one_unit_each and all(unit.part == "ffn" for unit in self.units):
            stem, version, more = "blocks", STATISTICS_VERSION, {}
            blocks = [
                {"distance_sums": block.distance_sums, **unit}
                for block, unit in zip(self.blocks, units, strict=True)
            ]
        else:
            stem, version = "units", VERSION_WITH_UNITS
            blocks = [asdict(block) for block in self.blocks]
            more = {
                "units": [
                    {"block": unit.block, **entry}
                    for unit, entry in zip(self.units, units, strict=True)
                ]
            }
        tensors: dict[str, Tensor] = {}
        for i, unit in enumerate(self.units):
            tensors[f"{stem}.{i}.sum"] = unit.sum_F.contiguous()
            tensors[f"{stem}.{i}.sum_of_squares"] = unit.sum_of_squares_F.contiguous()
            if len(unit.output_norm_E):
                tensors[f"{stem}.{i}.output_norm"] = unit.output_norm_E.contiguous()
        facts = {
            "version": version,
            "record": asdict(self.record),
            "blocks": blocks,
            **more,
            **({"sensitivity": self.sensitivity.to_json()} if self.sensitivity else {}),
            **({"removals": [each.to_json() for each in self.removals]} if self.removals else {}),
            **({"runs": asdict(self.runs)} if self.runs else {}),
        }
        # One entry only: the library writes several in random order, and the same statistics
        # shall give the same bytes.
        write_atomically(path, save(tensors, metadata={_METADATA_KEY: json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read statistics.

        Raises:
            StatisticsError: the file is missing, damaged, or of another version.
        """
        if not path.is_file():
            raise StatisticsError(f"{path} does not exist; make it with: cfsp calibrate MODEL")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise StatisticsError(
                f"{path} is not a statistics file: {error}; make one with: cfsp calibrate MODEL"
            ) from error
        try:
            facts = json.loads(metadata[_METADATA_KEY])
            version = facts["version"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise StatisticsError(
                f"{path} is not a statistics file; make one with: cfsp calibrate MODEL"
            ) from error
        if version not in (1, STATISTICS_VERSION, VERSION_WITH_UNITS):
            raise StatisticsError(
                f"{path} has statistics version {version}, "
                f"expected 1 to {VERSION_WITH_UNITS}; calibrate again"
            )
        try:
            record = _record(facts["record"])
            blocks = tuple(_block(entry, i) for i, entry in enumerate(facts["blocks"]))
            stem = "units" if version == VERSION_WITH_UNITS else "blocks"
            units = tuple(
                _unit({"block": i, **entry}, tensors, f"{stem}.{i}")
                for i, entry in enumerate(facts[stem])
            )
            _check_order(units, len(blocks))
            sensitivity = sensitivity_from_json(facts.get("sensitivity"), len(blocks))
            removals = removals_from_json(facts.get("removals", ()), len(blocks))
            runs = _runs(facts.get("runs"), len(blocks))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise StatisticsError(f"{path} is damaged: {error!r}; calibrate again") from error
        if not blocks:
            raise StatisticsError(f"{path} describes no block; calibrate again")
        for i, block in enumerate(blocks):
            own = [unit for unit in units if unit.block == i]
            if not all(map(math.isfinite, block.distance_sums.values())) or not all(
                map(_is_possible, own)
            ):
                raise StatisticsError(
                    f"{path} has NaN, infinite or impossible values in block {i}; calibrate again"
                )
        return cls(blocks, units, record, sensitivity, removals, runs)


def _entry_of(unit: UnitStatistics) -> dict[str, Any]:
    """Return what is written of a unit besides its sums."""
    entry: dict[str, Any] = {"tokens": unit.tokens}
    if unit.routed_E:
        entry["routed"] = unit.routed_E
    if unit.part != "ffn":
        entry["part"] = unit.part
    if unit.distance_sums:
        entry["distance_sums"] = unit.distance_sums
    return entry


def _record(fields: dict[str, Any]) -> CalibrationRecord:
    record = CalibrationRecord(**fields)
    for key, kind in CalibrationRecord.__annotations__.items():
        expected = {"str": str, "int": int, "bool": bool}.get(kind, dict)
        if type(getattr(record, key)) is not expected:
            raise TypeError(f"{key} is not of type {expected.__name__}")
    return record


def sensitivity_from_json(fields: dict[str, Any] | None, blocks: int) -> Sensitivity | None:
    """Return the sensitivity whose fields were written as JSON; None where there are none.

    Args:
        fields: its fields.
        blocks: how many blocks the model has.

    Raises:
        ValueError: the values cannot be those of so many blocks.
    """
    if fields is None:
        return None

    def checked(values: Any) -> tuple[float, ...]:
        divergence_L = tuple(float(value) for value in values)
        if len(divergence_L) != blocks or not all(0 <= value < math.inf for value in divergence_L):
            raise ValueError(f"the sensitivity of {blocks} blocks is {divergence_L}")
        return divergence_L

    others = dict(fields.get("divergence_of", {}))
    return Sensitivity(
        checked(fields["divergence_L"]),
        float(fields["sparsity"]),
        int(fields["windows"]),
        {str(part): checked(values) for part, values in others.items()},
    )


def removals_from_json(fields: Sequence[dict[str, Any]], blocks: int) -> tuple[Removal, ...]:
    """Return the removals whose fields were written as JSON.

    Args:
        fields: their fields.
        blocks: how many blocks the model has.

    Raises:
        ValueError: they cannot be those of so many blocks.
    """
    found = tuple(
        Removal(
            int(each["block"]),
            float(each["divergence"]),
            each.get("part", "blocks"),
            tuple(each.get("among", ())),
        )
        for each in fields
    )
    places = {(each.among, each.part, each.block) for each in found}
    possible = {
        (among, part, block)
        for among in ((), WHOLE_PARTS)
        for part in WHOLE_PARTS
        for block in range(blocks)
    }
    if len(places) < len(found) or not places <= possible:
        raise ValueError(f"of {blocks} blocks those that go are {sorted(places)}")
    return found


def _runs(fields: dict[str, Any] | None, blocks: int) -> RunDistances | None:
    if fields is None:
        return None
    sums = tuple(tuple(float(value) for value in row) for row in fields["sums"])
    if [len(row) for row in sums] != [blocks + 1] * (blocks + 1) or int(fields["tokens"]) < 1:
        raise ValueError(f"the distances over runs are not those of {blocks} blocks")
    if not all(math.isfinite(value) for row in sums for value in row):
        raise ValueError("the distances over runs are NaN or infinite")
    return RunDistances(sums, int(fields["tokens"]))


def _block(entry: dict[str, Any], index: int) -> BlockStatistics:
    tokens = int(entry["tokens"])
    if tokens < 1:
        raise ValueError(f"block {index} has seen {tokens} tokens")
    if "distances" in entry:
        sums = {name: float(entry["distances"][name]) * tokens for name in DISTANCES}
    else:
        sums = {name: float(entry["distance_sums"][name]) for name in DISTANCES}
    return BlockStatistics(sums, tokens)


def _unit(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> UnitStatistics:
    sum_F, squares_F = tensors[f"{name}.sum"], tensors[f"{name}.sum_of_squares"]
    if sum_F.ndim != 1 or sum_F.shape != squares_F.shape:
        raise ValueError(f"{name} has sums of shapes {sum_F.shape} and {squares_F.shape}")
    block, tokens = int(entry["block"]), int(entry["tokens"])
    if tokens < 1:
        raise ValueError(f"{name} has seen {tokens} tokens")
    routed_E = tuple(int(seen) for seen in entry.get("routed", ()))
    if routed_E and (min(routed_E) < 0 or len(sum_F) % len(routed_E)):
        raise ValueError(f"{name} has {len(sum_F)} channels in {len(routed_E)} experts")
    output_norm_E = tensors.get(f"{name}.output_norm", NOT_SEEN).double()
    if len(output_norm_E) not in (0, len(routed_E)):
        raise ValueError(f"{name} has outputs of {len(output_norm_E)} experts")
    part = entry.get("part", "ffn")
    if part not in UNIT_PARTS:
        raise ValueError(f"{name} is of the part {part!r}")
    # Of a file with one unit in each block, these are the block's.
    sums = dict(entry["distance_sums"]) if part != "ffn" and "distance_sums" in entry else {}
    distance_sums = {distance: float(sums[distance]) for distance in DISTANCES if sums}
    return UnitStatistics(
        block,
        sum_F.double(),
        squares_F.double(),
        tokens,
        routed_E,
        part,
        distance_sums,
        output_norm_E,
    )


def _check_order(units: Sequence[UnitStatistics], blocks: int) -> None:
    order = [unit.block for unit in units]
    if order != sorted(order) or not all(0 <= block < blocks for block in order):
        raise ValueError(f"the FFNs of {blocks} blocks are said to be in blocks {order}")


def _is_possible(unit: UnitStatistics) -> bool:
    sums = torch.stack([unit.sum_F, unit.sum_of_squares_F])
    if not all(map(math.isfinite, unit.distance_sums.values())):
        return False
    if not bool(torch.isfinite(unit.output_norm_E).all()) or bool((unit.output_norm_E < 0).any()):
        return False
    return bool(torch.isfinite(sums).all()) and bool((unit.sum_of_squares_F >= 0).all())

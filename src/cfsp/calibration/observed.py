"""What calibration gathers in each block and each unit of it, as values and in a file.

A file is one calibration: sums of channels as tensors, all else as JSON in its metadata.

Shapes: E experts, F FFN channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import StatisticsError
from cfsp.settings import UNIT_PARTS, Part

STATISTICS_VERSION = 6
_METADATA_KEY = "cfsp_statistics"


# Of units whose experts' outputs are not looked at.
NOT_SEEN = torch.zeros(0, dtype=torch.float64)


@dataclass(frozen=True)
class BlockStatistics:
    """What the calibration tokens did in one block."""

    distance_sum: float  # over tokens, of the angular distance between its input and output
    tokens: int

    @property
    def distance(self) -> float:
        """Mean angular distance over all tokens."""
        return self.distance_sum / self.tokens

    @property
    def is_possible(self) -> bool:
        """Whether tokens were seen, and the sum is not NaN or infinite."""
        return type(self.tokens) is int and self.tokens > 0 and math.isfinite(self.distance_sum)


@dataclass(frozen=True)
class UnitStatistics:
    """What the calibration tokens did in one unit; sums of tensors are float64."""

    block: int
    # Over tokens, of the square of each activation that enters the unit's down matrix: of an FFN
    # one for each channel.
    sum_of_squares_F: Tensor
    tokens: int  # that passed the block
    # Tokens that were routed to each expert; empty in a unit with one FFN. Channels are then
    # numbered through, expert after expert, and sums are over the tokens that were routed to the
    # expert, activations weighted as the router weights its output.
    routed_E: tuple[int, ...] = ()
    part: Part = "ffn"
    # Of an attention, over tokens, of the angular distance between the hidden state before it and
    # that after it; None where these are not seen.
    distance_sum: float | None = None
    # Over the tokens routed to each expert, of the L2 norm of what it adds, its output times the
    # router's weight; empty where whole experts can't go.
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

    @property
    def is_possible(self) -> bool:
        """Whether tokens were seen, and no sum is NaN, infinite, negative or of another shape."""
        sums = torch.cat([self.sum_of_squares_F.flatten(), self.output_norm_E.flatten()])
        return (
            BlockStatistics(self.distance_sum or 0.0, self.tokens).is_possible
            and self.sum_of_squares_F.ndim == self.output_norm_E.ndim == 1
            and min(self.routed_E, default=0) >= 0
            and len(self.sum_of_squares_F) % self.ffns == 0
            and len(self.output_norm_E) in (0, len(self.routed_E))
            and self.part in UNIT_PARTS
            and bool(((sums >= 0) & torch.isfinite(sums)).all())
        )


@dataclass(frozen=True)
class CalibrationRecord:
    """The conditions of a calibration, for the manifest and for refusing what doesn't fit."""

    model: str  # as the user called it
    fingerprint: str
    sources: dict[str, int]  # windows from each source of text
    tokens_digest: str  # SHA-256 of the exact token ids
    windows: int
    seqlen: int
    seed: int
    dtype: str
    device: str
    bos: bool

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> CalibrationRecord:
        """Return the record whose fields were written as JSON."""
        record = CalibrationRecord(**fields)
        for key, kind in CalibrationRecord.__annotations__.items():
            expected = {"str": str, "int": int, "bool": bool}.get(kind, dict)
            if type(getattr(record, key)) is not expected:
                raise TypeError(f"{key} is not of type {expected.__name__}")
        return record


@dataclass(frozen=True)
class ObservedBlock:
    """What calibration gathers in one block: its own statistics, and those of its units."""

    block: BlockStatistics
    units: tuple[UnitStatistics, ...]
    # The hidden states of some tokens, as they enter and leave it (2 x S x D); None where runs of
    # blocks are not compared.
    passing: Tensor | None = None

    def save(self, directory: Path, index: int) -> None:
        """Write what was gathered in the block at an index, for a killed pass."""
        more = {} if self.passing is None else {"passing": self.passing.contiguous()}
        facts = {"block": asdict(self.block)}
        write_atomically(_path(directory, index), file_of_facts(facts, self.units, more))

    @staticmethod
    def load(directory: Path, index: int) -> ObservedBlock:
        """Read what `save` wrote."""
        facts, tensors = read_facts(_path(directory, index))
        block = BlockStatistics(**facts["block"])
        return ObservedBlock(block, units_from(facts, tensors), tensors.get("passing"))


def file_of_facts(
    facts: Mapping[str, Any],
    units: Sequence[UnitStatistics],
    more: Mapping[str, Tensor] | None = None,
) -> bytes:
    """Return the file of JSON types, units and more tensors; the same give the same bytes."""
    tensors, entries = dict(more or {}), []
    for number, unit in enumerate(units):
        entry: dict[str, Any] = {"block": unit.block, "tokens": unit.tokens}
        if unit.routed_E:
            entry["routed"] = unit.routed_E
        if unit.part != "ffn":
            entry["part"] = unit.part
        if unit.distance_sum is not None:
            entry["distance_sum"] = unit.distance_sum
        entries.append(entry)
        tensors[f"units.{number}.sum_of_squares"] = unit.sum_of_squares_F.contiguous()
        if len(unit.output_norm_E):
            tensors[f"units.{number}.output_norm"] = unit.output_norm_E.contiguous()
    # One entry only: the library writes several in random order, and the same statistics
    # shall give the same bytes.
    text = json.dumps({"version": STATISTICS_VERSION, **facts, "units": entries})
    return save(tensors, metadata={_METADATA_KEY: text})


def read_facts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file of `file_of_facts` has; nothing but the version is checked."""
    if not path.is_file():
        raise StatisticsError(
            f"{path} {'is a directory' if path.is_dir() else 'does not exist'}; make a statistics "
            "file with: cfsp calibrate MODEL, or name that of a pruned model, DIR/cfsp.statistics"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StatisticsError(
            f"{path} is not a statistics file: {error}; make one with: cfsp calibrate MODEL"
        ) from error
    try:
        facts: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
        version = facts["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StatisticsError(
            f"{path} is not a statistics file; make one with: cfsp calibrate MODEL"
        ) from error
    if version != STATISTICS_VERSION:
        raise StatisticsError(
            f"{path} has statistics version {version}, expected {STATISTICS_VERSION}; "
            "calibrate again"
        )
    return facts, tensors


def units_from(
    facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[UnitStatistics, ...]:
    """Return the units of a file; see `UnitStatistics.is_possible`."""
    return tuple(
        UnitStatistics(
            block=int(entry["block"]),
            sum_of_squares_F=tensors[f"units.{number}.sum_of_squares"].double(),
            tokens=entry["tokens"],
            routed_E=tuple(int(seen) for seen in entry.get("routed", ())),
            part=entry.get("part", "ffn"),
            distance_sum=float(entry["distance_sum"]) if "distance_sum" in entry else None,
            output_norm_E=tensors.get(f"units.{number}.output_norm", NOT_SEEN).double(),
        )
        for number, entry in enumerate(facts["units"])
    )


def _path(directory: Path, block: int) -> Path:
    return directory / f"statistics-{block:05d}.safetensors"

"""Statistics: all that calibration learnt, as a value that can be saved and read.

They are computed once; any criterion, sparsity or target is then planned from them without
another forward pass. On disk: `statistics.safetensors` (per-channel sums) with all else as
JSON in its metadata, so that one file is one calibration.

Shapes: F FFN channels, L blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import StatisticsError
from cfsp.settings import DISTANCES

# Version 1 held means of distances where version 2 holds sums; it is still read.
STATISTICS_VERSION = 2
_METADATA_KEY = "cfsp_statistics"


@dataclass(frozen=True)
class BlockStatistics:
    """What the calibration tokens did in one block.

    Attributes:
        distance_sums: sum over tokens of each distance between the block's input and output.
        sum_F: sum of each channel's activation over all tokens, float64.
        sum_of_squares_F: sum of its squares, float64.
        tokens: number of tokens.
        routed_E: tokens that were routed to each expert; empty in a block with one FFN. Channels
            are then numbered through, expert after expert, and sums are over the tokens that
            were routed to the expert, activations weighted as the router weights its output.
    """

    distance_sums: dict[str, float]
    sum_F: Tensor
    sum_of_squares_F: Tensor
    tokens: int
    routed_E: tuple[int, ...] = ()

    @property
    def ffns(self) -> int:
        """Number of FFNs: 1, or the number of experts."""
        return len(self.routed_E) or 1

    @property
    def width(self) -> int:
        """Channels of one FFN."""
        return len(self.sum_F) // self.ffns

    def of_ffn(self, ffn: int) -> BlockStatistics:
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
    def distances(self) -> dict[str, float]:
        """Mean of each distance over all tokens."""
        return {name: total / self.tokens for name, total in self.distance_sums.items()}

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
        divergence_L: KL(dense || that block pruned), in nats per token; 0 or more.
        sparsity: fraction of the block's channels that was removed.
        windows: number of windows that it was measured on.
    """

    divergence_L: tuple[float, ...]
    sparsity: float
    windows: int


@dataclass(frozen=True)
class Statistics:
    """Statistics of every block, and how they were made.

    Attributes:
        blocks: sums of each block.
        record: the conditions.
        sensitivity: of every block; None if it was not measured: it requires the whole model
            in memory.
    """

    blocks: tuple[BlockStatistics, ...]
    record: CalibrationRecord
    sensitivity: Sensitivity | None = None

    @property
    def tokens(self) -> int:
        """Number of calibration tokens."""
        return self.blocks[0].tokens

    def distances(self, metric: str) -> list[float]:
        """Return one distance for every block."""
        return [block.distances[metric] for block in self.blocks]

    def save(self, path: Path) -> None:
        """Write the statistics to one file, atomically.

        Raises:
            OutputError: the place is not writable.
        """
        tensors: dict[str, Tensor] = {}
        for i, block in enumerate(self.blocks):
            tensors[f"blocks.{i}.sum"] = block.sum_F.contiguous()
            tensors[f"blocks.{i}.sum_of_squares"] = block.sum_of_squares_F.contiguous()
        facts = {
            "version": STATISTICS_VERSION,
            "record": asdict(self.record),
            "blocks": [
                {
                    "distance_sums": block.distance_sums,
                    "tokens": block.tokens,
                    **({"routed": block.routed_E} if block.routed_E else {}),
                }
                for block in self.blocks
            ],
            **({"sensitivity": asdict(self.sensitivity)} if self.sensitivity else {}),
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
        if version not in (1, STATISTICS_VERSION):
            raise StatisticsError(
                f"{path} has statistics version {version}, "
                f"expected {STATISTICS_VERSION}; calibrate again"
            )
        try:
            record = _record(facts["record"])
            blocks = tuple(_block(entry, tensors, i) for i, entry in enumerate(facts["blocks"]))
            sensitivity = _sensitivity(facts.get("sensitivity"), len(blocks))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise StatisticsError(f"{path} is damaged: {error!r}; calibrate again") from error
        if not blocks:
            raise StatisticsError(f"{path} describes no block; calibrate again")
        for i, block in enumerate(blocks):
            sums = torch.stack([block.sum_F, block.sum_of_squares_F])
            finite = bool(torch.isfinite(sums).all()) and bool((block.sum_of_squares_F >= 0).all())
            if not finite or not all(map(math.isfinite, block.distance_sums.values())):
                raise StatisticsError(
                    f"{path} has NaN, infinite or impossible values in block {i}; calibrate again"
                )
        return cls(blocks, record, sensitivity)


def _record(fields: dict[str, Any]) -> CalibrationRecord:
    record = CalibrationRecord(**fields)
    for key, kind in CalibrationRecord.__annotations__.items():
        expected = {"str": str, "int": int, "bool": bool}.get(kind, dict)
        if type(getattr(record, key)) is not expected:
            raise TypeError(f"{key} is not of type {expected.__name__}")
    return record


def _sensitivity(fields: dict[str, Any] | None, blocks: int) -> Sensitivity | None:
    if fields is None:
        return None
    divergence_L = tuple(float(value) for value in fields["divergence_L"])
    if len(divergence_L) != blocks or not all(0 <= value < math.inf for value in divergence_L):
        raise ValueError(f"the sensitivity of {blocks} blocks is {divergence_L}")
    return Sensitivity(divergence_L, float(fields["sparsity"]), int(fields["windows"]))


def _block(entry: dict[str, Any], tensors: dict[str, Tensor], index: int) -> BlockStatistics:
    sum_F = tensors[f"blocks.{index}.sum"]
    squares_F = tensors[f"blocks.{index}.sum_of_squares"]
    if sum_F.ndim != 1 or sum_F.shape != squares_F.shape:
        raise ValueError(f"block {index} has sums of shapes {sum_F.shape} and {squares_F.shape}")
    tokens = int(entry["tokens"])
    if tokens < 1:
        raise ValueError(f"block {index} has seen {tokens} tokens")
    if "distances" in entry:
        sums = {name: float(entry["distances"][name]) * tokens for name in DISTANCES}
    else:
        sums = {name: float(entry["distance_sums"][name]) for name in DISTANCES}
    routed_E = tuple(int(seen) for seen in entry.get("routed", ()))
    if routed_E and (min(routed_E) < 0 or len(sum_F) % len(routed_E)):
        raise ValueError(f"block {index} has {len(sum_F)} channels in {len(routed_E)} experts")
    return BlockStatistics(sums, sum_F.double(), squares_F.double(), tokens, routed_E)

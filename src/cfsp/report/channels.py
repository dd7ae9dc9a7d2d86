"""What statistics say about the channels of a block: distribution, cut, and energy removed.

The activation energy of a channel is the sum of its squared activation over the calibration
tokens. If channels were uncorrelated and their output columns of equal length, the share of
energy that is removed would be exactly the relative squared error of the FFN's output. They
are neither, but it comes close, and it needs nothing but the statistics: on SmolLM2-135M at
half the channels its correlation with the measured error over blocks is 0.97.

Shapes: F FFN channels (of all experts of a block, one after the other), E experts, L blocks,
N bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cfsp.calibration.statistics import BlockStatistics, Statistics
from cfsp.planning.plan_file import BlockPlan, PruningPlan

Floats = npt.NDArray[np.float64]

_BINS = 48
# Of all channels, this share may lie beyond either end; they count in the bin at that end. A
# single massive channel would otherwise press all others into a corner.
_TAIL = 0.002
_MOST_POINTS = 256


@dataclass(frozen=True)
class BlockChannels:
    """The channels of one block.

    Attributes:
        kept_N: channels in each bin that stay.
        removed_N: channels in each bin that go.
        median: of the root mean square activation.
        strongest: the largest one.
        cut: root mean square activation of the weakest channel that stays.
        energy_removed: share of activation energy that goes.
    """

    kept_N: list[int]
    removed_N: list[int]
    median: float
    strongest: float
    cut: float
    energy_removed: float


@dataclass(frozen=True)
class Distribution:
    """Channels of all blocks in common bins of log10 root mean square activation."""

    edges_N1: list[float]
    blocks: list[BlockChannels]


def distribution(statistics: Statistics, plan: PruningPlan) -> Distribution:
    """Return how strong the channels of every block are, and which of them stay."""
    rms = [_rms_F(block) for block in statistics.blocks]
    log = [np.log10(np.maximum(each, _least_positive(rms))) for each in rms]
    every = np.concatenate(log)
    low, high = (float(edge) for edge in np.quantile(every, (_TAIL, 1 - _TAIL)))
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BINS + 1)
    blocks = [
        _block(np.clip(log_F, low, high), rms_F, edges, observed, block)
        for log_F, rms_F, observed, block in zip(
            log, rms, statistics.blocks, plan.blocks, strict=True
        )
    ]
    return Distribution(edges.tolist(), blocks)


def energy_removed(statistics: BlockStatistics, kept: Sequence[int]) -> float:
    """Return the share of activation energy in the channels that are not kept."""
    energy_F = statistics.sum_of_squares_F.numpy()
    total = float(energy_F.sum())
    return max(0.0, 1 - float(energy_F[list(kept)].sum()) / total) if total > 0 else 0.0


def curve_step(width: int, multiple: int) -> int:
    """Return the distance of a curve's points: the multiple, or more where they were too many."""
    return multiple * math.ceil(width / multiple / _MOST_POINTS)


def removal_curve(statistics: BlockStatistics, step: int) -> list[float]:
    """Return the share of energy that goes if only the k strongest channels (of each expert) stay.

    Returns:
        One value for k = 0, step, 2 step, ...; the last is 0, for all channels.
    """
    energy_EF = statistics.sum_of_squares_F.numpy().reshape(statistics.ffns, statistics.width)
    energy_F = np.sort(energy_EF, axis=1)[:, ::-1].sum(axis=0)
    total = float(energy_F.sum())
    removed = 1 - np.concatenate([[0.0], np.cumsum(energy_F)]) / (total if total > 0 else 1.0)
    points = [*removed[:-1:step], 0.0]
    return [float(f"{max(0.0, value):.5g}") for value in points]


def _rms_F(block: BlockStatistics) -> Floats:
    seen_E = [max(tokens, 1) for tokens in block.routed_E or (block.tokens,)]
    mean_square: Floats = block.sum_of_squares_F.numpy() / np.repeat(seen_E, block.width)
    return np.sqrt(mean_square)


def _least_positive(rms: Sequence[Floats]) -> float:
    positive = [float(each[each > 0].min()) for each in rms if (each > 0).any()]
    return min(positive, default=1.0)


def _block(
    log_F: Floats, rms_F: Floats, edges: Floats, statistics: BlockStatistics, plan: BlockPlan
) -> BlockChannels:
    mask_F = np.zeros(len(rms_F), dtype=bool)
    mask_F[list(plan.kept)] = True
    return BlockChannels(
        kept_N=np.histogram(log_F[mask_F], edges)[0].tolist(),
        removed_N=np.histogram(log_F[~mask_F], edges)[0].tolist(),
        median=float(np.median(rms_F)),
        strongest=float(rms_F.max()),
        cut=float(rms_F[mask_F].min()),
        energy_removed=energy_removed(statistics, plan.kept),
    )

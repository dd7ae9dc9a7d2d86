"""Fine importance: how much each channel of an FFN, or KV group of an attention, matters.

Shapes: D hidden, F FFN channels. X_i is the L2 norm of channel i's activation over all
calibration tokens (`UnitStatistics.norm_F`); Wd is D x F, Wu and Wg are F x D.

    activation  X_i. What the published code does: its weights are normalised over D within a
                channel, so every term sums to one and the score is X_i alone.
    relative    X_i * (down_i + up_i + gate_i), each matrix normalised ACROSS channels:
                  down_i = sum_j |Wd_ji| X_i / sum_i' |Wd_ji'| X_i'
                  up_i   = sum_j |Wu_ij| / sum_i' |Wu_i'j|        gate_i alike
    eq8         X_i * (down_i + 1 + 1): the paper's Eq. 8 as others cite it, which normalises
                up and gate within a channel, where they are constant.
    wanda       mean_j |Wd_ji| * X_i                              (Sun et al. 2306.11695)
    magnitude   |Wd_.i|, the L2 norm of a column of the down projection
    random      drawn by chance, again alike for the same calibration: what any other must beat

An attention is scored in the same way at its output matrix, column by column, without the terms of
matrices that make channels; a KV group's score is the sum over the columns of its query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from cfsp.calibration.observed import UnitStatistics
from cfsp.checkpoint.ffn_tensors import down_matrix, input_matrices
from cfsp.checkpoint.reading import WeightSource
from cfsp.errors import UsageError
from cfsp.settings import CHANNEL_METRICS


@dataclass(frozen=True)
class FFNWeights:
    """The matrices of one FFN as they are stored; no gate in an FFN that has none.

    Of an attention only the output matrix is there.

    Scores are float32: metrics convert one matrix at a time, because three copies of a wide FFN
    would be more memory than anything else that the pass of the repair needs.
    """

    down_DF: Tensor
    up_FD: Tensor | None
    gate_FD: Tensor | None


def read_ffn_weights(source: WeightSource, unit: int, ffn: int = 0) -> FFNWeights:
    """Read the matrices of one FFN of a unit from a model, however its checkpoint stores them."""
    if source.units[unit].part == "kv":
        return FFNWeights(down_matrix(source, unit).cpu(), None, None)
    gate_FD, up_FD = input_matrices(source, unit, ffn)
    return FFNWeights(
        down_matrix(source, unit, ffn).cpu(),
        up_FD.cpu(),
        None if gate_FD is None else gate_FD.cpu(),
    )


def _activation(statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    return statistics.norm_F.float()


def _relative(statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    share_F: Tensor = _down_share(statistics, weights)
    for input_FD in (weights.up_FD, weights.gate_FD):
        if input_FD is not None:
            share_F = share_F + _across_channels(input_FD)
    return share_F * statistics.norm_F.float()


def _eq8(statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    constant_terms = sum(input_FD is not None for input_FD in (weights.up_FD, weights.gate_FD))
    share_F: Tensor = _down_share(statistics, weights) + constant_terms
    return share_F * statistics.norm_F.float()


def _wanda(statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    mean_F: Tensor = _magnitudes(weights.down_DF).mean(0)
    return mean_F * statistics.norm_F.float()


def _magnitude(statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    norm_F: Tensor = torch.linalg.vector_norm(weights.down_DF.float(), dim=0)
    return norm_F


def _random(statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    # Seeded by the activations: the same calibration gives the same draw, another seed of its
    # windows another one, and no two blocks share theirs.
    digest = sha256(statistics.sum_of_squares_F.cpu().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(weights.down_DF.shape[1], generator=generator)


def _down_share(statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    """Return the share of each channel in every output row, summed over rows."""
    weighted_DF = _magnitudes(weights.down_DF).mul_(statistics.norm_F.float())
    share_F: Tensor = weighted_DF.div_(_positive(weighted_DF.sum(1, keepdim=True))).sum(0)
    return share_F


def _across_channels(input_FD: Tensor) -> Tensor:
    """Return the share of each channel in every input column, summed over columns."""
    magnitude_FD = _magnitudes(input_FD)
    share_F: Tensor = magnitude_FD.div_(_positive(magnitude_FD.sum(0, keepdim=True))).sum(1)
    return share_F


def _magnitudes(matrix: Tensor) -> Tensor:
    """Return a float32 matrix of its own; nothing else as large is made on the way."""
    return matrix.to(torch.float32, copy=True).abs_()


def _positive(sums: Tensor) -> Tensor:
    # A row of zeros has no shares to give; it must not give NaN either.
    return sums.clamp_min(torch.finfo(torch.float32).tiny)


_METRICS: dict[str, Callable[[UnitStatistics, FFNWeights], Tensor]] = {
    "relative": _relative,
    "eq8": _eq8,
    "activation": _activation,
    "wanda": _wanda,
    "magnitude": _magnitude,
    "random": _random,
}
assert tuple(_METRICS) == CHANNEL_METRICS


def channel_scores(metric: str, statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    """Return the score of every channel of one FFN, float32, higher = keep.

    Raises:
        UsageError: the metric is unknown.
    """
    if metric not in _METRICS:
        raise UsageError(
            f"unknown channel metric {metric!r}; known are: {', '.join(CHANNEL_METRICS)}"
        )
    return _METRICS[metric](statistics, weights)


def strongest_channels(score_F: Tensor, count: int) -> list[int]:
    """Return the indices of the `count` highest scores, ascending; ties go to lower indices."""
    order = torch.sort(score_F, descending=True, stable=True).indices
    return sorted(order[:count].tolist())

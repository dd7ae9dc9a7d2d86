"""Which channels of a unit stay, when their number is decided: the strongest, by a score of each.

Experts that saw too few tokens are scored by their weights alone, and people are told.

Shapes: D hidden, F FFN channels. X_i is the L2 norm of channel i's activation over all
calibration tokens (`UnitStatistics.norm_F`); Wd is D x F, Wu and Wg are F x D.

    activation  X_i. What the published code does: its weights are normalised over D within a
                channel, so every term sums to one and the score is X_i alone.
    relative    X_i * (down_i + up_i + gate_i), each matrix normalised ACROSS channels:
                  down_i = sum_j |Wd_ji| X_i / sum_i' |Wd_ji'| X_i'
                  up_i   = sum_j |Wu_ij| / sum_i' |Wu_i'j|        gate_i alike
    eq8         X_i * (down_i + 1 + 1): the paper's Eq. 8 as others cite it, which normalises
                up and gate within a channel, where they are constant.

An attention is scored in the same way at its output matrix, column by column, without the terms of
matrices that make channels; a KV group's score is the sum over the columns of its query heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.calibration.observed import UnitStatistics
from cfsp.checkpoint.reading import WeightSource, down_matrix, input_matrices
from cfsp.planning.experts import expert_scores, few_tokens, strongest_experts
from cfsp.settings import Criterion


@dataclass(frozen=True)
class FFNWeights:
    """The matrices of one FFN as they are stored; of an attention the output matrix alone.

    Metrics convert one at a time to float32: three copies of a wide FFN would be more memory than
    anything else that the pass of the repair needs.
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


def channel_scores(metric: str, statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    """Return the score of every channel of one FFN by a metric, float32, higher = keep."""
    norm_F, down_DF = statistics.norm_F.float(), weights.down_DF
    inputs = [matrix for matrix in (weights.up_FD, weights.gate_FD) if matrix is not None]
    score_F: Tensor = norm_F
    if metric in ("relative", "eq8"):
        share_F = _shares(_magnitudes(down_DF).mul_(norm_F), across=1)
        if metric == "eq8":
            share_F = share_F + len(inputs)
        else:
            for input_FD in inputs:
                share_F = share_F + _shares(_magnitudes(input_FD), across=0)
        score_F = share_F * norm_F
    else:
        assert metric == "activation", metric
    return score_F


def weight_norms(weights: FFNWeights) -> Tensor:
    """Return the L2 norm of every column of the down projection, float32."""
    norm_F: Tensor = torch.linalg.vector_norm(weights.down_DF.float(), dim=0)
    return norm_F


def _shares(magnitudes: Tensor, across: int) -> Tensor:
    """Return the share of each channel in the sum across channels, summed over the other axis."""
    # A row of zeros has no shares to give; it must not give NaN either.
    sums = magnitudes.sum(across, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    share_F: Tensor = magnitudes.div_(sums).sum(1 - across)
    return share_F


def _magnitudes(matrix: Tensor) -> Tensor:
    """Return a float32 matrix of its own; nothing else as large is made on the way."""
    return matrix.to(torch.float32, copy=True).abs_()


def strongest_channels(score_F: Tensor, count: int) -> list[int]:
    """Return the indices of the `count` highest scores, ascending; ties go to lower indices."""
    order = torch.sort(score_F, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def choose_channels(
    source: WeightSource,
    unit: int,
    statistics: UnitStatistics,
    width: int,
    criterion: Criterion,
    experts: int = 0,
) -> tuple[int, ...]:
    """Return the strongest channels of one unit, ascending; of each of the strongest experts.

    An expert that saw few tokens is scored by its weights alone, and the plan says so.
    """
    found, of_model = source.units[unit], source.architecture.experts
    staying: Sequence[int] = range(statistics.ffns)
    if experts and found.expert_axes and of_model is not None:
        scores = expert_scores(statistics)
        staying = strongest_experts(scores, statistics.ffns - experts, of_model.groups)
    if width == found.width:
        return tuple(ffn * width + i for ffn in staying for i in range(width))
    kept: list[int] = []
    few = few_tokens(statistics)
    for ffn in staying if width else ():
        weights = read_ffn_weights(source, unit, ffn)
        if ffn in few:
            score_F = weight_norms(weights)
        else:
            score_F = channel_scores(criterion.channel_metric, statistics.of_ffn(ffn), weights)
        # The columns of a KV group lie side by side.
        score_F = score_F.view(found.width, -1).sum(1)
        kept += [ffn * found.width + i for i in strongest_channels(score_F, width)]
    return tuple(kept)

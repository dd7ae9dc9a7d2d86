"""How much each block matters (coarse), and which channels of a unit stay (fine).

Coarse: from how far a block moves the hidden state, or from its sensitivity. Only blocks that have
a unit count: the budget is spent there. Every FFN unit is as important as its block; an attention
by how far it moves the hidden state where that is seen. Fine: when the number of channels is
decided, the strongest stay, by a score of each; experts that saw too few tokens are scored by their
weights alone, and people are told.

Shapes: L blocks that have a unit, U units, D hidden, F FFN channels, E experts. X_i is the L2 norm
of channel i's activation over all calibration tokens (`UnitStatistics.norm_F`); Wd is D x F, Wu and
Wg F x D.

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

import logging
import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from cfsp.architecture.expert_proof import counts_near, failure_with
from cfsp.architecture.found import Unit
from cfsp.architecture.proof import small_run_of
from cfsp.calibration.observed import UnitStatistics
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import FFNWeights, WeightSource, read_ffn_weights
from cfsp.checkpoint.skeleton import stock_config
from cfsp.errors import BudgetError, StatisticsError
from cfsp.planning.allocation import ModelSize
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import ANGULAR, SENSITIVITY, UNIFORM, Criterion, Part

# The published code sums angular distances over 128 windows of 1024 tokens and divides by 1e4
# before the sigmoid. With means instead of sums that is this gain, at any calibration size.
SIGMOID_GAIN = 128 * 1024 / 1e4

_LEAST_SHARE = 1e-3

# Angular distance settles with little text.
COARSE_WINDOWS = 8

# The relative error of a root mean square over n tokens is about 1 / sqrt(2 n): one in eight here.
LEAST_TOKENS = 32
_MOST_NAMED = 8
# Where experts are redundant, those that go add much less than their share of all experts.
_MUCH_OF_THEIR_SHARE = 0.5

SCORE_IN_WORDS = "router weight x output norm, mean over their tokens (REAP)"

log = logging.getLogger(__name__)


def block_distances(statistics: Statistics, metric: str) -> list[float]:
    """Return the angular distance of every block with a unit; by `uniform` all have the mean."""
    distance_L = _of_blocks_with_units(statistics, statistics.distance_L)
    return [fmean(distance_L)] * len(distance_L) if metric == UNIFORM else distance_L


def block_importance(distance_L: Sequence[float]) -> list[float]:
    """Return the normalised importance of every block, in (0, 1), by distances d.

    s_l = sigmoid(g * (d_l - mean d)),  g = 13.1072   (CFSP Eq. 4, published code)
    """
    mean = fmean(distance_L)
    return [_sigmoid(SIGMOID_GAIN * (distance - mean)) for distance in distance_L]


def importance_by(statistics: Statistics, metric: str) -> list[float]:
    """Return the normalised importance of every block with a unit by one metric, in (0, 1].

    By sensitivity it is sqrt(KL_l) over the largest, where KL_l is what halving the block would
    cost. If removing a share 1 - k of a block costs KL_l (1/k - 1), widths in proportion to
    sqrt(KL_l) cost least: hence the root.
    """
    if metric != SENSITIVITY:
        return block_importance(block_distances(statistics, metric))
    if statistics.sensitivity is None:
        raise StatisticsError(
            f"the block metric {metric} needs the blocks' sensitivity, which these statistics do "
            f"not have; make them with: cfsp calibrate --set block_metric={metric}, and the same "
            "--parts"
        )
    halved_L = _of_blocks_with_units(statistics, statistics.sensitivity.halved_L)
    root_L = [math.sqrt(divergence) for divergence in halved_L]
    # A block that nothing depends on still counts a little: importance is positive.
    least = max(root_L) * _LEAST_SHARE or 1.0
    largest = max(*root_L, least)
    return [max(root, least) / largest for root in root_L]


def importance_of_units(
    statistics: Statistics, metric: str, size: ModelSize, spent: Sequence[Part]
) -> tuple[list[float], list[float]]:
    """Return the distance and the normalised importance of every unit.

    Widths in proportion to it share the cost between parts: by sensitivity, if removing a share
    1 - k of a unit costs KL (1/k - 1) and frees its P parameters by that share, what is cheapest
    is k in proportion to sqrt(KL / P). Distances of several parts are not comparable; each part
    then gives up about as large a share. What was not measured of parts that are not `spent`,
    which lose no channels, is not needed.
    """
    parts = list(dict.fromkeys(unit.part for unit in statistics.units))
    compared = metric == SENSITIVITY and len([part for part in parts if part in spent]) > 1
    distance_U, importance_U = ([0.0] * len(statistics.units) for _ in range(2))
    for part in parts:
        own = statistics.of_part(part)
        numbers = [index for index, unit in enumerate(statistics.units) if unit.part == part]
        is_needed = part in spent or own.sensitivity is not None
        importance_L = importance_by(own, metric if is_needed else ANGULAR)
        if compared and own.sensitivity is not None:
            largest = max(_of_blocks_with_units(own, own.sensitivity.halved_L))
            each = fmean(size.units[i].width * size.units[i].channel_parameters for i in numbers)
            scale = math.sqrt(largest / each)
            importance_L = [importance * scale for importance in importance_L]
        pairs = zip(block_distances(own, metric), importance_L, strict=True)
        of_block = dict(zip(own.blocks_with_units, pairs, strict=True))
        for index in numbers:
            distance_U[index], importance_U[index] = of_block[statistics.units[index].block]
    if compared:
        # Where nothing depends on anything, all count alike.
        largest = max(importance_U) or 1.0
        importance_U = [max(value / largest, _LEAST_SHARE**2) for value in importance_U]
    return distance_U, importance_U


def _of_blocks_with_units(statistics: Statistics, values: Sequence[float]) -> list[float]:
    return [values[block] for block in statistics.blocks_with_units]


def _sigmoid(x: float) -> float:
    # Both branches keep the exponent negative: no overflow at any distance.
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def channel_scores(metric: str, statistics: UnitStatistics, weights: FFNWeights) -> Tensor:
    """Return the score of every channel of one FFN by a metric, float32, higher = keep."""
    norm_F: Tensor = statistics.norm_F.float()
    if metric == "activation":
        return norm_F
    assert metric in ("relative", "eq8"), metric
    inputs = [matrix for matrix in (weights.up_FD, weights.gate_FD) if matrix is not None]
    share_F = _shares(_magnitudes(weights.down_DF).mul_(norm_F), across=1)
    if metric == "eq8":
        return (share_F + len(inputs)) * norm_F
    for input_FD in inputs:
        share_F = share_F + _shares(_magnitudes(input_FD), across=0)
    return share_F * norm_F


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
    unit: Unit,
    statistics: UnitStatistics,
    width: int,
    criterion: Criterion,
    experts: int = 0,
) -> tuple[int, ...]:
    """Return the strongest channels of one unit, ascending; of each of the strongest experts."""
    of_model = source.architecture.experts
    staying: Sequence[int] = range(statistics.ffns)
    if experts and unit.expert_axes and of_model is not None:
        scores = expert_scores(statistics)
        staying = strongest_experts(scores, statistics.ffns - experts, of_model.groups)
    if width == unit.width:
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
        score_F = score_F.view(unit.width, -1).sum(1)
        kept += [ffn * unit.width + i for i in strongest_channels(score_F, width)]
    return tuple(kept)


# Experts that stay are equally many in every block, so that a stock config says it.


def expert_scores(statistics: UnitStatistics) -> Tensor:
    """Return the score of every expert of a unit, float64 [E].

    REAP, router-weighted expert activation pruning (Lasby et al., ICLR 2026, arXiv 2510.13999): the
    mean over the tokens that are routed to the expert of the router's weight times the L2 norm of
    the expert's output. An expert that no token was routed to scores 0.
    """
    routed_E = torch.tensor(statistics.routed_E, dtype=torch.float64)
    return statistics.output_norm_E / routed_E.clamp_min(1)


def strongest_experts(score_E: Tensor, count: int, groups: int = 1) -> list[int]:
    """Return so many experts with the highest scores, ascending; of equal ones the first.

    Of groups, which lie one after the other, equally many stay.
    """
    order_GE = score_E.view(groups, -1).argsort(dim=1, descending=True, stable=True)
    first_G1 = torch.arange(0, len(score_E), len(score_E) // groups)[:, None]
    kept: list[int] = (first_G1 + order_GE)[:, : count // groups].flatten().sort().values.tolist()
    return kept


def experts_to_remove(source: WeightSource, wanted: float, *, exactly: bool) -> int:
    """Return how many experts of every block go, so that a number stays by which the model runs.

    It is the one that is nearest to `wanted`; `exactly` refuses another.
    """
    experts = source.architecture.experts
    assert experts is not None
    have, groups, run = experts.count, experts.groups, small_run_of(stock_config(source.config))

    def runs_with(count: int) -> bool:
        return failure_with(source.architecture, run, count) is None

    rounded = max(0, groups * round(wanted / groups))
    if rounded == have and (rounded == wanted or not exactly):
        return 0
    found = next((n for n in counts_near(rounded, experts) if runs_with(n)), have)
    asked = f"{have - (wanted if exactly else rounded):.0f} of {have} experts of each block"
    refusal = f"cannot remove {asked}: the router of {source.label}"
    # A router may want a multiple of something, which is one step away, or a least number.
    if found > rounded and not any(runs_with(n) for n in range(1, rounded)):
        least = next((n for n in range(groups, have + 1, groups) if runs_with(n)), have)
        can_go = f"between 0 and {have - least} can be removed ({(have - least) / have:.1%})"
        raise BudgetError(f"{refusal} needs {least}; {can_go}")
    if exactly and found != wanted:
        can_go = f"{have - found} can be removed"
        raise BudgetError(f"{refusal} does not run with {wanted:.0f}; {can_go}")
    return have - found


def lost_output(statistics: UnitStatistics, kept: list[int]) -> float:
    """Return the share of the summed norms of what a unit's experts add that those add which go.

    So much of the mixture is gone before the router gives the tokens to others.
    """
    total = float(statistics.output_norm_E.sum())
    return 1 - float(statistics.output_norm_E[kept].sum()) / total if total else 0.0


def few_tokens(statistics: UnitStatistics) -> dict[int, int]:
    """Return the experts that saw too few tokens to be scored by them, and how many they saw."""
    return {expert: seen for expert, seen in enumerate(statistics.routed_E) if seen < LEAST_TOKENS}


def warn_of_experts(plan: PruningPlan) -> None:
    """Tell people which experts saw too few tokens, and where those that go do much."""
    few = plan.experts_with_few_tokens
    consequences = ["whether they go is decided by noisy scores"] if plan.kept_experts else []
    if any(unit.few_tokens and unit.kept_width < unit.width for unit in plan.kept_units):
        consequences.append("their channels are chosen by their weights alone")
    if few and consequences:
        named = ", ".join(
            f"block {each['block']}{' ' + each['path'] if 'path' in each else ''} expert "
            f"{each['expert']} ({each['tokens']})"
            for each in few[:_MOST_NAMED]
        )
        more = f" and {len(few) - _MOST_NAMED} more" if len(few) > _MOST_NAMED else ""
        experts = sum(unit.ffns for unit in plan.kept_units if unit.ffns > 1)
        log.warning(
            f"{len(few)} of {experts} experts saw fewer than {LEAST_TOKENS} calibration tokens, so "
            f"{', and '.join(consequences)}: {named}{more}; give more --samples"
        )
    if plan.kept_experts is None:
        return
    gone = 1 - plan.kept_experts / max(unit.ffns for unit in plan.units)
    if plan.lost_output > _MUCH_OF_THEIR_SHARE * gone:
        log.warning(
            "the experts of this model are not redundant on this text: %s; expect much worse "
            "answers, measure tasks, and try channels inside the experts (--parts ffn)",
            plan.experts_in_words,
        )

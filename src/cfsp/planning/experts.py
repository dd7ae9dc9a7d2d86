"""Which routed experts stay: equally many in every block, so that a stock config says it.

Shapes: E experts.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from cfsp.architecture import expert_proof
from cfsp.architecture.expert_proof import counts_near
from cfsp.architecture.proof import small_run_of
from cfsp.calibration.observed import UnitStatistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.skeleton import stock_config
from cfsp.errors import BudgetError, StatisticsError
from cfsp.planning.plan_file import PruningPlan

# The relative error of a root mean square over n tokens is about 1 / sqrt(2 n): one in eight here.
LEAST_TOKENS = 32
_MOST_NAMED = 8
# Where experts are redundant, those that go add much less than their share of all experts.
_MUCH_OF_THEIR_SHARE = 0.5

SCORE_IN_WORDS = "router weight x output norm, mean over their tokens (REAP)"

log = logging.getLogger(__name__)


def expert_scores(statistics: UnitStatistics) -> Tensor:
    """Return the score of every expert of a unit, float64 [E].

    REAP, router-weighted expert activation pruning (Lasby et al., ICLR 2026, arXiv 2510.13999): the
    mean over the tokens that are routed to the expert of the router's weight times the L2 norm of
    the expert's output. An expert that no token was routed to scores 0.
    """
    if not len(statistics.output_norm_E):
        raise StatisticsError(
            "the removal of experts needs what each of them adds, which these statistics do not "
            "have; make them with: cfsp calibrate --parts experts"
        )
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
    rounded = max(0, experts.groups * round(wanted / experts.groups))
    if rounded == experts.count:
        return 0
    found = next((n for n in counts_near(rounded, experts) if runs_with(source, n)), experts.count)
    of_each = "experts of each block"
    # A router may want a multiple of something, which is one step away, or a least number.
    if found > rounded and not any(runs_with(source, n) for n in range(1, rounded)):
        counts = range(experts.groups, experts.count + 1, experts.groups)
        least = next((n for n in counts if runs_with(source, n)), experts.count)
        most = experts.count - least
        raise BudgetError(
            f"cannot remove {experts.count - rounded} of {experts.count} {of_each}: the router of "
            f"{source.label} needs {least}; between 0 and {most} can be removed "
            f"({most / experts.count:.1%})"
        )
    if exactly and found != wanted:
        raise BudgetError(
            f"cannot remove {experts.count - wanted:.0f} of {experts.count} {of_each}: the router "
            f"of {source.label} does not run with {wanted:.0f}; {experts.count - found} can be "
            "removed"
        )
    return experts.count - found


def runs_with(source: WeightSource, count: int) -> bool:
    """Return whether the model runs with so many experts in every block."""
    run = small_run_of(stock_config(source.config))
    return expert_proof.runs_with(source.architecture, run, count)


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

"""Prune as little as makes the model so much faster, from latencies measured on this machine."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cfsp.engine.compute import engine_of
from cfsp.errors import BudgetError, UsageError
from cfsp.goals.latency import Latencies, measure_latencies, most_speedup
from cfsp.goals.resolution import Resolution, Try
from cfsp.goals.search import budget_at, highest_step, last_that_holds
from cfsp.planning.make import model_size, plan_widths
from cfsp.speed import Conditions

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import PruneSettings, TargetSpeedup

logger = logging.getLogger(__name__)


def check_possible(goal: TargetSpeedup, source: WeightSource, settings: PruneSettings) -> None:
    """Check, before anything is timed, that pruning could make a model so much faster at all.

    Raises:
        BudgetError: not even in proportion to the work that would be left.
        UsageError: its FFNs are of several kinds, so that no one width says how long it takes.
    """
    size = model_size(source)
    if len(kinds := sorted({unit.kind for unit in size.units})) > 1:
        raise UsageError(
            "--target-speedup times models with one FFN width in all blocks, and the FFNs of "
            f"{source.label} are of several kinds ({', '.join(kinds)}); give --sparsity and "
            "measure with cfsp bench"
        )
    least = min(size.least_U(settings.budget))
    most = most_speedup(source, least, goal.phase, engine_of(settings.compute, source))
    if goal.ratio > most:
        raise BudgetError(
            f"{goal.phase} cannot become {goal.ratio:g} times faster by pruning the FFN: "
            f"attention, head and at least {least} channels of every block stay, and without all "
            f"else it would be {most:.2f} times faster at best; ask for less"
        )


def resolve_speedup(
    goal: TargetSpeedup, source: WeightSource, statistics: Statistics, settings: PruneSettings
) -> Resolution:
    """Measure latencies, and return the least sparsity whose predicted speed-up is enough.

    Args:
        goal: how much faster, and in which phase.
        source: the model.
        statistics: of its calibration, which widths follow from.
        settings: what counts as important, the multiple, and where to compute.

    Raises:
        BudgetError: no sparsity is predicted to be enough.
        UsageError: the models to time do not fit into memory.
    """
    size = model_size(source)
    multiple = max(size.multiple_U(settings.budget))
    engine = engine_of(settings.compute, source)
    latencies = measure_latencies(source.config, size, multiple, goal.phase, engine)
    warn_of_disturbance(latencies)
    return choose(goal, source, statistics, settings, latencies)


def warn_of_disturbance(latencies: Latencies) -> None:
    """Tell people that other programs took so much of the machine that little can be predicted."""
    share = float(latencies.conditions["disturbance"])
    if share > Conditions.disturbance:
        logger.warning(
            f"other programs took {share:.0%} of the processors while latencies were measured: the "
            "prediction is unreliable; repeat it on a quiet machine"
        )


def choose(
    goal: TargetSpeedup,
    source: WeightSource,
    statistics: Statistics,
    settings: PruneSettings,
    latencies: Latencies,
) -> Resolution:
    """Return the least sparsity that is enough by these latencies; see `resolve_speedup`."""
    size = model_size(source)
    tried: list[Try] = []

    def is_too_slow(step: int) -> bool:
        budget = budget_at(step, settings.budget)
        kept_U = plan_widths(source, statistics, budget, settings.criterion).kept_U
        predicted = latencies.speedup(size.width_U, kept_U)
        fits = predicted >= goal.ratio
        tried.append(Try(budget.sparsity, size.parameters_with(kept_U), predicted, fits))
        return not fits

    highest = highest_step(size, settings.budget)
    if is_too_slow(highest):
        raise BudgetError(
            f"{goal.phase} cannot become {goal.ratio:g} times faster by pruning the FFN: without "
            f"{tried[0].sparsity:.1%} of its channels it is predicted to be {tried[0].value:.2f} "
            "times faster, and attention and head stay; ask for less"
        )
    chosen = last_that_holds(highest, is_too_slow) + 1
    return Resolution(
        budget_at(chosen, settings.budget),
        "target_speedup",
        goal.ratio,
        tuple(tried),
        {
            "phase": goal.phase,
            "widths": list(latencies.widths),
            "relative_latency": [round(value, 4) for value in latencies.relative],
            **latencies.conditions,
        },
    )

"""From a goal to a budget; a calibration that this requires is kept for the plan.

What a goal came to is written down in the workplace: a run that is resumed after a kill must not
measure anew and come to other widths than those of the blocks that are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cfsp.calibration.together import calibrate_together
from cfsp.engine.compute import engine_of
from cfsp.engine.stopwatch import Stopwatch
from cfsp.engine.workplace import kept, temporary_workplace
from cfsp.errors import UsageError
from cfsp.goals.kv_cache import aim_at_kv_cache, resolve_kv_cache
from cfsp.goals.latency import Latencies
from cfsp.goals.loss import held_out_windows, resolve_loss
from cfsp.goals.resolution import Resolution
from cfsp.goals.speedup import Speed, aim_at_speed, check_possible, measured, resolve_speedup
from cfsp.planning.make import check_statistics_fit, model_size, plan_from_statistics
from cfsp.planning.removal_budget import RemovalBudget, RemovedWhole, WholeSizes
from cfsp.repair.trial import divergence_when_repaired
from cfsp.settings import (
    Goal,
    MaxLossIncrease,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
)
from cfsp.text.tokenizers import load_tokenizer
from cfsp.whole_model.load import load_whole
from cfsp.whole_model.removal_count import half_alone, with_removal_count
from cfsp.whole_model.removal_order import (
    check_can_be_compared,
    follow_runs,
    with_needed_removals,
)
from cfsp.whole_model.sensitivity import with_needed_sensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import Checkpoint, WeightSource
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.settings import Budget, PruneSettings
    from cfsp.text.windows import Windows


def resolve_parameters(
    goal: TargetParameters, source: WeightSource, settings: PruneSettings
) -> Resolution:
    """Return the budget that leaves a fraction of all parameters; nothing needs to be tried."""
    # Rounded, so that 0.7 that stay are 0.3 that go.
    sparsity = round(1 - goal.fraction, 12)
    budget = replace(settings.budget, sparsity=sparsity, of="model")
    before = {"parameters_before": model_size(source).parameters}
    return Resolution(budget, "target_params", goal.fraction, (), before)


def resolve_goal(
    goal: Goal,
    source: WeightSource,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    draw: Callable[[], Windows],
    settings: PruneSettings,
    *,
    place: Workplace,
    watch: Stopwatch,
    statistics: Statistics | None = None,
) -> tuple[Resolution, Statistics | None]:
    """Return what a goal comes to, and the statistics if it took any.

    Args:
        goal: the goal.
        source: the model.
        tokenizer: gives its tokenizer; called only if there is text to read.
        draw: gives the calibration windows; called only if they are needed.
        settings: how to prune; of its budget only the multiple and the kind of widths count.
        place: where to work.
        watch: is told the time of each stage.
        statistics: of an earlier calibration of this model.

    Raises:
        CfspError: the goal cannot be met, or cannot be measured here.
    """
    budget = settings.budget
    if isinstance(goal, TargetParameters):
        return resolve_parameters(goal, source, settings), statistics
    if isinstance(goal, TargetKVCache):
        resolution = resolve_kv_cache(goal, source, settings)
        if not budget.leaves_number_open:
            return resolution, statistics
    elif isinstance(goal, MaxLossIncrease) and (budget.whole_parts or budget.removes_experts):
        raise UsageError(
            "--max-loss-increase is met by FFN channels and KV groups alone, which are masked to "
            "measure it; give --target-params, --target-speedup or --sparsity with --parts "
            f"{','.join(budget.parts)}, or leave --parts out"
        )
    if isinstance(goal, TargetSpeedup):
        check_possible(goal, source, settings)
    engine = engine_of(settings.compute, source)
    if budget.leaves_number_open and statistics is not None:
        RemovalBudget.of(source, budget)  # says what it requires
    if isinstance(goal, TargetSpeedup) and _is_one_whole_part(budget):
        with watch.stage("try"):
            speed = Speed(goal, source, settings, _latencies(goal, source, settings, place))
            return speed.fewest(_beginnings(source, budget)), statistics
    texts = []
    if isinstance(goal, MaxLossIncrease):
        # Too little text should be found out before the calibration.
        texts = held_out_windows(goal, settings.text, tokenizer())
    if statistics is None:
        windows = draw()
        alone = settings
        if budget.whole_parts and budget.remove_whole is None:
            alone = replace(settings, budget=half_alone(budget))
            check_can_be_compared(source, [alone], engine)
        with watch.stage("calibrate"):
            statistics = calibrate_together(
                source,
                windows,
                engine,
                seed=settings.text.seed,
                place=place,
                runs=follow_runs(source, [alone], engine),
            )
            statistics = with_needed_removals(source, statistics, windows, [alone], engine, place)
            if budget.removes_channels:
                statistics = with_needed_sensitivity(
                    source, statistics, windows, settings, engine, place
                )
    check_statistics_fit(source, statistics)
    if budget.leaves_number_open:
        with watch.stage("try"):
            return _with_number(goal, source, statistics, draw(), settings, place)
    if isinstance(goal, TargetSpeedup):
        with watch.stage("try"):
            latencies = _latencies(goal, source, settings, place)
            return resolve_speedup(Speed(goal, source, settings, latencies), statistics), statistics

    def measure() -> dict[str, Any]:
        assert isinstance(goal, MaxLossIncrease)
        model = load_whole(source, engine, "--max-loss-increase")
        return resolve_loss(goal, source, model, texts, statistics, settings).to_json()

    with watch.stage("try"):
        return Resolution.from_json(kept(place, "goal", measure)), statistics


def _latencies(
    goal: TargetSpeedup, source: WeightSource, settings: PruneSettings, place: Workplace
) -> Latencies:
    """Return what a killed run measured, or measure it."""
    found = kept(place, "latencies", lambda: measured(goal, source, settings).to_json())
    return Latencies.from_json(found)


def _is_one_whole_part(budget: Budget) -> bool:
    """Return whether blocks go and nothing else, or attentions: how many is all there is to it."""
    return len(budget.whole_parts) == 1 and not budget.removes_channels


def _beginnings(source: WeightSource, budget: Budget) -> Iterator[RemovedWhole]:
    """Yield a first block or attention, the first two, and so on; one stays."""
    parts = budget.whole_parts
    candidates = WholeSizes.of(source, parts).candidates(RemovedWhole())
    removed = RemovedWhole()
    for candidate in candidates[:-1]:
        removed = removed.plus(candidate)
        yield removed


def _with_number(
    goal: Goal,
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    settings: PruneSettings,
    place: Workplace,
) -> tuple[Resolution, Statistics]:
    """Choose how many go whole, of numbers that all meet a goal: the nearest to the dense model.

    Raises:
        BudgetError: none meets it.
    """
    engine = engine_of(settings.compute, source)
    repaired = None
    if settings.repair != "none":
        repaired = divergence_when_repaired(source, windows, settings, engine)
    if isinstance(goal, TargetKVCache):
        resolution = resolve_kv_cache(goal, source, settings)
        aim = aim_at_kv_cache(goal, source, settings.budget)
    else:
        assert isinstance(goal, TargetSpeedup)
        speed = Speed(goal, source, settings, _latencies(goal, source, settings, place))
        speed.check_reached(statistics)
        aim = aim_at_speed(speed)
    chosen, statistics = with_removal_count(
        source, statistics, windows, settings, engine, place, repaired, aim
    )
    if isinstance(goal, TargetKVCache):
        return replace(resolution, budget=chosen.budget), statistics
    return resolve_speedup(replace(speed, settings=chosen), statistics), statistics


def plan_for_goal(
    source: Checkpoint, statistics: Statistics, settings: PruneSettings, goal: Goal | None
) -> tuple[PruningPlan, dict[str, Any]]:
    """Return the plan that statistics and settings give, and what its goal came to, as JSON types.

    Raises:
        CfspError: the statistics do not fit, or the goal cannot be met.
    """
    facts: dict[str, Any] = {}
    if goal is not None:
        with temporary_workplace(settings.compute.memory_budget) as place:
            resolution, _ = resolve_goal(
                goal,
                source,
                lambda: load_tokenizer(source.directory),
                _never,
                settings,
                place=place,
                watch=Stopwatch(),
                statistics=statistics,
            )
        settings, facts = replace(settings, budget=resolution.budget), resolution.to_json()
    plan = plan_from_statistics(source, statistics, settings.budget, settings.criterion)
    return plan, facts


def _never() -> Windows:
    raise AssertionError("statistics are there, so no text is drawn")

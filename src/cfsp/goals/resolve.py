"""From a goal to a budget; a calibration that this requires is kept for the plan.

What a goal came to is written down in the workplace: a run that is resumed after a kill must not
measure anew and come to other widths than those of the blocks that are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cfsp.engine.compute import engine_of
from cfsp.engine.workplace import kept, temporary_workplace
from cfsp.goals.kv_cache import (
    aim_at_kv_cache,
    budget_for_kv_cache,
    is_known_beforehand,
    resolve_kv_cache,
)
from cfsp.goals.latency import Latencies
from cfsp.goals.loss import held_out_windows, resolve_loss
from cfsp.goals.parameters import MANY_CHANNELS, budget_for_parameters, parts_to_try
from cfsp.goals.resolution import Resolution
from cfsp.goals.speedup import Speed, aim_at_speed, check_possible, measured, resolve_speedup
from cfsp.planning.make import check_statistics_fit, plan_from_statistics
from cfsp.planning.numbers_to_try import half_alone, share_of_channels
from cfsp.planning.removal_budget import RemovedWhole, WholeSizes, check_is_definite
from cfsp.planning.widths import NOTHING, model_size
from cfsp.repair.ladder import calibrated, drawn
from cfsp.repair.trial import with_count_by_repair
from cfsp.settings import (
    DEFAULT_PARTS,
    MaxLossIncrease,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
)
from cfsp.text.tokenizers import load_tokenizer
from cfsp.whole_model.load import load_whole
from cfsp.whole_model.removal_order import check_can_be_compared

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import Checkpoint, WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.numbers_to_try import Aim
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.settings import Budget, PruneSettings
    from cfsp.text.windows import Windows


def resolve_goal(
    source: WeightSource,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    draw: Callable[[], Windows],
    settings: PruneSettings,
    *,
    place: Workplace,
    statistics: Statistics | None = None,
) -> tuple[Resolution, Statistics | None]:
    """Return what a goal comes to, and the statistics if it took any.

    Args:
        source: the model.
        tokenizer: gives its tokenizer; called only if there is text to read.
        draw: gives the calibration windows; called only if they are needed.
        settings: how to prune, by which goal; of its budget only the parts, the multiple and the
            kind of widths count.
        place: where to work.
        statistics: of an earlier calibration of this model.

    Raises:
        CfspError: the goal cannot be met, or cannot be measured here.
    """
    work, goal = _Work(source, draw, settings, place, statistics), settings.goal
    if isinstance(goal, TargetParameters):
        return _with_parameters(goal, work), statistics
    if isinstance(goal, TargetKVCache):
        return _with_kv_cache(goal, work)
    if isinstance(goal, TargetSpeedup):
        return _with_speedup(goal, work)
    assert goal is not None
    return _within_loss(goal, work, tokenizer)


@dataclass(frozen=True)
class _Work:
    """What a goal is resolved from; see `resolve_goal`."""

    source: WeightSource
    draw: Callable[[], Windows]
    settings: PruneSettings
    place: Workplace
    statistics: Statistics | None

    @property
    def engine(self) -> Engine:
        return engine_of(self.settings.compute, self.source)

    def calibrated(self) -> Statistics:
        """Return the statistics, with the order of all that may go whole if they are made now."""
        statistics, settings = self.statistics, self.settings
        if statistics is None:
            windows, budget = drawn(self.draw, settings), settings.budget
            if budget.whole_parts and budget.remove_whole is None:
                check_can_be_compared(self.source, [settings], self.engine)
                settings = replace(settings, budget=half_alone(budget))
            statistics = calibrated(self.source, windows, settings, self.engine, self.place)
        check_statistics_fit(self.source, statistics)
        return statistics

    def with_count(self, statistics: Statistics, aim: Aim) -> tuple[PruneSettings, Statistics]:
        """Choose how many go whole, of numbers that all meet the aim."""
        settings = self.settings
        return with_count_by_repair(
            self.source,
            statistics,
            drawn(self.draw, settings),
            settings,
            self.engine,
            self.place,
            aim,
        )


def _with_parameters(goal: TargetParameters, work: _Work) -> Resolution:
    source, settings, place = work.source, work.settings, work.place
    budget = budget_for_parameters(goal, settings.budget)
    if settings.leaves_parts_open and work.statistics is None:
        share = share_of_channels(source, budget, DEFAULT_PARTS, NOTHING)
        if share >= MANY_CHANNELS:
            windows = work.draw()  # in every process: they compare what they drew

            def choose() -> dict[str, Any]:
                parts = parts_to_try(source, budget, share, settings, work.engine, windows)
                return {"parts": parts}

            # A run that is resumed may find another amount of memory.
            parts = place.team.from_first(lambda: kept(place, "parts", choose)["parts"])
            budget = replace(budget, parts=tuple(parts))
    before = {"parameters_before": model_size(source).parameters}
    return Resolution(budget, "target_params", goal.fraction, (), before)


def _with_kv_cache(goal: TargetKVCache, work: _Work) -> tuple[Resolution, Statistics | None]:
    source, settings = work.source, work.settings
    resolution = resolve_kv_cache(goal, source, settings)
    if is_known_beforehand(source, settings.budget):
        return resolution, work.statistics
    statistics = work.calibrated()
    if not settings.budget.leaves_number_open:
        budget = budget_for_kv_cache(goal, source, settings, statistics)
        return replace(resolution, budget=budget), statistics
    aim = aim_at_kv_cache(goal, source, settings)
    chosen, statistics = work.with_count(statistics, aim)
    return replace(resolution, budget=chosen.budget), statistics


def _with_speedup(goal: TargetSpeedup, work: _Work) -> tuple[Resolution, Statistics | None]:
    source, settings, place = work.source, work.settings, work.place
    check_possible(goal, source, settings)

    def speed() -> Speed:
        """Take what a killed run measured, or measure it; of several processes in the first."""
        found = place.team.from_first(
            lambda: kept(place, "latencies", lambda: measured(goal, source, settings).to_json())
        )
        return Speed(goal, source, settings, Latencies.from_json(found))

    if _is_one_whole_part(settings.budget):
        with work.place.watch.stage("try"):
            return speed().fewest(_beginnings(source, settings.budget)), work.statistics
    statistics = work.calibrated()
    with work.place.watch.stage("try"):
        wanted = speed()
        if settings.budget.leaves_number_open:
            wanted.check_reached(statistics)
            settings, statistics = work.with_count(statistics, aim_at_speed(wanted))
        return resolve_speedup(replace(wanted, settings=settings), statistics), statistics


def _within_loss(
    goal: MaxLossIncrease, work: _Work, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> tuple[Resolution, Statistics]:
    source, settings = work.source, work.settings
    # Too little text should be found out before the calibration.
    texts = held_out_windows(goal, settings.text, tokenizer())
    statistics = work.calibrated()

    def measure() -> dict[str, Any]:
        model = load_whole(source, work.engine, "--max-loss-increase")
        return resolve_loss(goal, source, model, texts, statistics, settings).to_json()

    with work.place.watch.stage("try"):
        return Resolution.from_json(kept(work.place, "goal", measure)), statistics


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


def plan_for_goal(
    source: Checkpoint, statistics: Statistics, settings: PruneSettings
) -> tuple[PruningPlan, dict[str, Any]]:
    """Return the plan that statistics and settings give, and what its goal came to, as JSON types.

    Raises:
        CfspError: the statistics do not fit, or the goal cannot be met.
    """
    facts: dict[str, Any] = {}
    check_is_definite(settings.budget)
    if settings.goal is not None:
        with temporary_workplace(settings.compute.memory_budget) as place:
            resolution, _ = resolve_goal(
                source,
                lambda: load_tokenizer(source.directory),
                _never,
                settings,
                place=place,
                statistics=statistics,
            )
        settings, facts = replace(settings, budget=resolution.budget), resolution.to_json()
    plan = plan_from_statistics(source, statistics, settings.budget, settings.criterion)
    return plan, facts


def _never() -> Windows:
    raise AssertionError("statistics are there, so no text is drawn")

"""From a goal to a budget; a calibration that this requires is kept for the plan.

What a goal came to is written down in the workplace: a run that is resumed after a kill must not
measure anew and come to other widths than those of the blocks that are finished.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.output import write_atomically
from cfsp.engine.compute import engine_of
from cfsp.engine.stopwatch import Stopwatch
from cfsp.engine.workplace import temporary_workplace
from cfsp.errors import BudgetError, UsageError
from cfsp.goals.loss import held_out_windows, resolve_loss
from cfsp.goals.resolution import Resolution
from cfsp.goals.speedup import check_possible, resolve_speedup
from cfsp.planning.make import check_statistics_fit, model_size, plan_from_statistics
from cfsp.settings import (
    Goal,
    MaxLossIncrease,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
)
from cfsp.text.tokenizers import load_tokenizer
from cfsp.whole_model.load import load_whole
from cfsp.whole_model.sensitivity import with_needed_sensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import Checkpoint, WeightSource
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.settings import PruneSettings
    from cfsp.text.windows import Windows

_FILE = "goal.json"


def resolve_parameters(
    goal: TargetParameters, source: WeightSource, settings: PruneSettings
) -> Resolution:
    """Return the budget that leaves a fraction of all parameters; nothing needs to be tried."""
    # Rounded, so that 0.7 that stay are 0.3 that go.
    sparsity = round(1 - goal.fraction, 12)
    budget = replace(settings.budget, sparsity=sparsity, of="model")
    before = {"parameters_before": model_size(source).parameters}
    return Resolution(budget, "target_params", goal.fraction, (), before)


def resolve_kv_cache(
    goal: TargetKVCache, source: WeightSource, settings: PruneSettings
) -> Resolution:
    """Return the budget that leaves a fraction of the KV groups; nothing needs to be tried.

    Raises:
        BudgetError: attentions would be left without any.
    """
    widths = [unit.width for unit in source.units if unit.part == "kv"]
    groups = sum(widths)
    stay = math.floor(goal.fraction * groups + 1e-9)
    if stay < len(widths):
        raise BudgetError(
            f"each of the {len(widths)} attentions keeps one of its KV groups, so "
            "--target-kv-cache must be at least "
            f"{math.ceil(1000 * len(widths) / groups) / 1000:g}, found "
            f"{goal.fraction:g}; whole attentions go with --parts attention"
        )
    # The rest goes; rounded, so that a half that stays is a half that goes.
    budget = replace(settings.budget, sparsity=round(1 - stay / groups, 12))
    return Resolution(budget, "target_kv_cache", goal.fraction, (), {"groups_before": groups})


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
    if isinstance(goal, TargetParameters):
        return resolve_parameters(goal, source, settings), statistics
    if isinstance(goal, TargetKVCache):
        return resolve_kv_cache(goal, source, settings), statistics
    budget = settings.budget
    if budget.whole_parts or budget.removes_experts:
        raise UsageError(
            "a loss or a speed is aimed at with FFN channels alone; give --target-params or "
            f"--sparsity with --parts {','.join(budget.parts)}, or leave --parts out"
        )
    if isinstance(goal, TargetSpeedup):
        check_possible(goal, source, settings)
    engine = engine_of(settings.compute, source)
    texts = []
    if isinstance(goal, MaxLossIncrease):
        # Too little text should be found out before the calibration.
        texts = held_out_windows(goal, settings.text, tokenizer())
    if statistics is None:
        windows = draw()
        with watch.stage("calibrate"):
            statistics = calibrate(source, windows, engine, seed=settings.text.seed, place=place)
            statistics = with_needed_sensitivity(
                source, statistics, windows, settings, engine, place
            )
    check_statistics_fit(source, statistics)
    identity = json.dumps([place.identity, type(goal).__name__, asdict(goal)])
    if (found := _read(place, identity)) is not None:
        return found, statistics
    with watch.stage("try"):
        if isinstance(goal, MaxLossIncrease):
            model = load_whole(source, engine, "--max-loss-increase")
            resolution = resolve_loss(goal, source, model, texts, statistics, settings)
        else:
            resolution = resolve_speedup(goal, source, statistics, settings)
    record = {"identity": identity, "resolution": resolution.to_json()}
    write_atomically(place.directory / _FILE, json.dumps(record).encode())
    return resolution, statistics


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


def _read(place: Workplace, identity: str) -> Resolution | None:
    path = place.directory / _FILE
    if place.identity is None or not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if record["identity"] != identity:
        return None
    return Resolution.from_json(record["resolution"])

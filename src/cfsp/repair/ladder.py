"""From a model and a text to all that the cut needs: which channels stay, and repaired weights.

    none -> ridge -> sequential -> local

Without repair: calibrate, then plan. With it, either the plan is there already and the pass of the
ridge obeys it, or widths come from a coarse pass over a few windows and everything else from one
pass over all. Each further step goes on from what the one before it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.calibration.calibrate import calibration_record
from cfsp.calibration.statistics import Statistics
from cfsp.calibration.together import calibrate_together, check_enough
from cfsp.checkpoint.skeleton import check_complete
from cfsp.engine.block_proof import check_experts_can_go
from cfsp.engine.two_streams import TwoStreams
from cfsp.errors import TextError, UnsupportedModelError
from cfsp.planning.allocation import channels_to_keep, check_multiple
from cfsp.planning.channels import choose_channels, warn_of_few_tokens
from cfsp.planning.experts import experts_to_remove, warn_of_lost_experts
from cfsp.planning.make import assemble_plan, check_statistics_fit, plan_from_statistics
from cfsp.planning.numbers_to_try import check_others_own_enough, whole_alone
from cfsp.planning.removal import check_can_go, whole_removal
from cfsp.planning.removal_budget import RemovalBudget, RemovedWhole
from cfsp.planning.widths import budget_of_channels, model_size, plan_widths
from cfsp.repair.local import repair_locally
from cfsp.repair.repaired import Repaired
from cfsp.repair.ridge_pass import choose_and_repair
from cfsp.repair.ridge_step import repair_by_plan, with_ridge
from cfsp.repair.sequential import repair_gaps, repair_sequentially, streams_of
from cfsp.repair.trial import with_count_by_repair
from cfsp.settings import REPAIRS, SENSITIVITY_METRICS
from cfsp.text.windows import check_is_text, few_windows
from cfsp.whole_model.removal_order import (
    check_can_be_compared,
    follow_runs,
    with_needed_removals,
)
from cfsp.whole_model.sensitivity import with_needed_sensitivity

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.processes import Team
    from cfsp.settings import Budget, Part, PruneSettings
    from cfsp.text.windows import Windows

# Angular distance settles with little text; study 7 (docs/STUDIES.md) shows how little.
COARSE_WINDOWS = 8


def plan_and_repair(
    source: WeightSource,
    draw: Callable[[], Windows],
    settings: PruneSettings,
    engine: Engine,
    *,
    place: Workplace,
    statistics: Statistics | None = None,
    plan: PruningPlan | None = None,
) -> Repaired:
    """Decide which blocks and channels stay, and repair what is left as the settings ask for.

    Args:
        source: the model.
        draw: gives the calibration windows; called only if they are needed.
        settings: how to prune.
        engine: where and in what to compute.
        place: where to work; must outlive the result, which has its repaired tensors there.
        statistics: of an earlier calibration of this model.
        plan: an earlier decision for this model.

    Raises:
        CfspError: as calibration, planning and repair do.
    """
    check_can_be_repaired(source, settings)
    check_complete(source)
    if plan is not None:
        _check_plan(source, plan)
    elif statistics is not None:
        check_statistics_fit(source, statistics)
        if settings.budget.leaves_number_open:
            windows = drawn(draw, settings)
            settings, statistics = with_count_by_repair(
                source, statistics, windows, settings, engine, place
            )
        with place.watch.stage("plan"):
            plan = plan_from_statistics(source, statistics, settings.budget, settings.criterion)
    else:
        check_budget(source, settings.budget)
        check_can_be_compared(source, [settings], engine)
    steps = REPAIRS[1 : REPAIRS.index(settings.repair) + 1]
    if _only_experts_go(settings.budget, plan):
        steps = ()  # nothing that stays could take over what they did
    if not steps:
        if plan is not None:
            return Repaired(plan, statistics)
        windows = drawn(draw, settings)
        return _calibrate_and_plan(source, windows, settings, engine, place)
    windows = drawn(draw, settings)
    _check_windows(windows, steps, settings, place.team)
    if plan is None and not settings.budget.removes_channels:
        repaired = _calibrate_and_plan(source, windows, settings, engine, place)
    elif plan is None:
        repaired = _choose_and_repair(source, windows, settings, engine, place)
    else:
        with place.watch.stage("ridge"):
            repaired = repair_by_plan(source, plan, statistics, windows, engine, place)
    if repaired.plan.has_gaps and "sequential" not in steps:
        with place.watch.stage("gaps"):
            repaired = repair_gaps(source, repaired, windows, engine, place)
    if "sequential" in steps:
        with place.watch.stage("sequential"):
            repaired = repair_sequentially(source, repaired, windows, engine, place)
    if "local" in steps:
        with place.watch.stage("local"):
            repaired = repair_locally(
                source, repaired, windows, engine, place, settings.local, settings.text.seed
            )
    return repaired


def _check_plan(source: WeightSource, plan: PruningPlan) -> None:
    """Check a plan that was made before.

    Raises:
        PlanError: it is of another model.
        UnsupportedModelError: the model cannot do without what goes whole.
    """
    plan.check_fits(source)
    check_can_go(source, RemovedWhole(plan.removed_blocks, plan.removed_attentions))
    if plan.kept_experts is not None:
        check_experts_can_go(source, plan.experts_of_blocks, plan.removed_blocks)


def _check_windows(
    windows: Windows, steps: Sequence[str], settings: PruneSettings, team: Team
) -> None:
    """Check that there are enough windows for the steps, and for every process.

    Raises:
        TextError: there are too few.
    """
    if len(windows.tokens_NT) < 2:
        raise TextError(
            "repair needs at least 2 windows, one of them held out, found 1; give more text, more "
            "--samples or shorter windows (--seqlen), or --effort fast"
        )
    if "sequential" in steps:
        check_enough(windows, team, streams_of(windows).batch)
    if "local" in steps:
        check_enough(windows, team, TwoStreams.of(windows, settings.local.tokens).batch)


def _only_experts_go(budget: Budget, plan: PruningPlan | None) -> bool:
    """Return whether nothing but whole experts goes."""
    if plan is None:
        return budget.parts == ("experts",)
    is_whole = all(unit.kept_width == unit.width for unit in plan.units)
    return plan.kept_experts is not None and is_whole


def check_budget(source: WeightSource, budget: Budget) -> None:
    """Check a budget before it has cost a forward pass.

    Raises:
        BudgetError: it is impossible whatever goes.
        UsageError: the model cannot be computed with the widths that it would have.
    """
    if budget.removes_channels:
        check_multiple(budget, model_size(source))
    if budget.leaves_experts_open:
        check_others_own_enough(source, budget)
        return
    experts = experts_to_remove(source, budget)
    if not budget.whole_parts:
        if budget.removes_channels:
            size = model_size(source, RemovedWhole(experts=experts))
            channels_to_keep(budget_of_channels(source, budget, size), size)
    elif not budget.leaves_number_open or budget.removes_blocks:
        # Whether channels give what blocks leave over is tried.
        RemovalBudget.of(source, budget.without_channels())


def drawn(draw: Callable[[], Windows], settings: PruneSettings) -> Windows:
    """Return the calibration windows.

    Raises:
        UsageError: they have images, and the settings ask for what reads text alone.
    """
    windows = draw()
    if settings.criterion.block_metric in SENSITIVITY_METRICS:
        check_is_text(windows, f"the block metric {settings.criterion.block_metric}")
    if settings.repair in ("sequential", "local"):
        check_is_text(windows, f"--repair {settings.repair}")
    whole: list[Part] = [*settings.budget.whole_parts]
    if settings.budget.leaves_experts_open:
        whole.append("experts")
    if whole:
        check_is_text(windows, f"--parts {','.join(whole)}")
    return windows


def check_can_be_repaired(source: WeightSource, settings: PruneSettings) -> None:
    """Check that a model's blocks can be repaired as the settings ask for.

    Raises:
        UnsupportedModelError: some have experts or several FFN units, and more than the ridge is
            asked for.
    """
    if settings.repair not in ("sequential", "local"):
        return
    experts = [unit.block for unit in source.units if unit.routed]
    ffns = [unit.block for unit in source.units if unit.part == "ffn"]
    several = [block for block in ffns if ffns.count(block) > 1]
    for blocks, found in (
        (experts, "has experts, each of which sees few tokens"),
        (several, "has several"),
    ):
        if blocks:
            raise UnsupportedModelError(
                f"--repair {settings.repair} is for blocks with at most one FFN, and block "
                f"{blocks[0]} of {source.label} ({source.config.model_type}) {found}; use "
                "--effort standard (--repair ridge)"
            )


def _calibrate_and_plan(
    source: WeightSource,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    place: Workplace,
) -> Repaired:
    # Where only blocks are chosen, nothing needs the whole text.
    all_of_it = settings.budget.removes_channels or settings.budget.removes_experts
    seen = windows if all_of_it else few_windows(windows, COARSE_WINDOWS)
    statistics = calibrated(source, windows, settings, engine, place, seen)
    settings, statistics = with_count_by_repair(
        source, statistics, windows, settings, engine, place
    )
    with place.watch.stage("plan"):
        plan = plan_from_statistics(source, statistics, settings.budget, settings.criterion)
    return Repaired(plan, statistics)


def calibrated(
    source: WeightSource,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    place: Workplace,
    seen: Windows | None = None,
    name: str = "calibrate",
) -> Statistics:
    """Calibrate, and measure what else the settings need: an order of removal, a sensitivity.

    Args:
        source: the model.
        windows: the calibration text.
        settings: how to prune.
        engine: where and in what to compute.
        place: where to work.
        seen: windows that pass the blocks; None for all.
        name: of that pass.
    """
    settings = replace(settings, budget=whole_alone(source, settings.budget))
    with place.watch.stage(name):
        statistics = calibrate_together(
            source,
            windows if seen is None else seen,
            engine,
            seed=settings.text.seed,
            place=place,
            name=name,
            runs=follow_runs(source, [settings], engine),
        )
    statistics = with_needed_removals(source, statistics, windows, [settings], engine, place)
    if settings.budget.removes_channels:
        statistics = with_needed_sensitivity(source, statistics, windows, settings, engine, place)
    return statistics


def _choose_and_repair(
    source: WeightSource,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    place: Workplace,
) -> Repaired:
    """Fix the widths from a few windows, then choose and repair in one pass over all."""
    criterion, seed = settings.criterion, settings.text.seed
    few = few_windows(windows, COARSE_WINDOWS)
    coarse = calibrated(source, windows, settings, engine, place, few, "coarse pass")
    settings, coarse = with_count_by_repair(source, coarse, windows, settings, engine, place)
    budget = settings.budget
    removed = whole_removal(source, coarse, budget, criterion.removal)
    widths = plan_widths(source, coarse, budget, criterion, removed)
    with place.watch.stage("ridge"):
        chosen = choose_and_repair(
            source,
            windows,
            lambda unit, observed: choose_channels(
                source, unit, observed, widths.kept_U[unit], criterion, removed.experts
            ),
            engine,
            place,
            seed=seed,
            removed=removed.blocks,
        )
    record = calibration_record(source, windows, engine, seed=seed)
    statistics = replace(
        Statistics.of([each.observed for each in chosen], record, coarse.sensitivity),
        removals=coarse.removals,
        runs=coarse.runs,
    )
    kept = [kept_K for block in chosen for kept_K in block.kept]
    plan = assemble_plan(source, statistics, budget, criterion, widths, kept, removed)
    warn_of_few_tokens(plan)
    warn_of_lost_experts(plan)
    return with_ridge(Repaired(plan, statistics), chosen)

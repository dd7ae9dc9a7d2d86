"""What goes, and the repair of what is left: from a job to all that the cut needs.

a plan is given          repair by it
statistics are there     select -> plan -> repair
nothing is, no repair    calibrate -> select -> plan
nothing is, with repair  a coarse pass over a few windows -> select -> one pass over all windows
                         that chooses the channels and repairs, block by block
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cfsp.calibration.calibrate import calibrate, calibration_record
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.cut.surgery import PrunedSource
from cfsp.job import Job
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.importance import COARSE_WINDOWS, warn_of_experts
from cfsp.planning.make import fitting_statistics
from cfsp.planning.plan_file import PruningPlan
from cfsp.pruning_cost import announce
from cfsp.repair.ladder import check_windows, needed_steps, repair, ridge_together
from cfsp.repair.result import PruningResult
from cfsp.repair.ridge_pass import Wanted, choose_and_repair, with_ridge
from cfsp.selection.constraint import Constraint
from cfsp.selection.divergence import with_needed_sensitivity
from cfsp.selection.drop_order import (
    cannot_be_tried,
    check_can_be_compared,
    check_can_go,
    follow_divergence,
    follow_runs,
    with_order,
)
from cfsp.selection.goal import constraint_of
from cfsp.selection.search import select
from cfsp.settings import PruneSettings, TargetSpeedup
from cfsp.streaming.block_proof import check_experts_can_go
from cfsp.streaming.runtime import runtime_of
from cfsp.streaming.work_dir import temporary_work_dir
from cfsp.text.windows import Windows, few_windows


@dataclass(frozen=True)
class Known:
    """What an earlier run on the model found: its statistics, or a whole plan."""

    statistics: Statistics | None = None
    plan: PruningPlan | None = None  # excludes a goal
    told: set[str] | None = None  # doubts that are not said again; None where each is
    ridged: Sequence[PruningResult] = ()  # plans that one pass repaired; see `decide_together`


NOTHING_KNOWN = Known()


def decide(job: Job, known: Known = NOTHING_KNOWN) -> tuple[PruningResult, dict[str, Any]]:
    """Decide which blocks and channels stay, and repair what is left as the settings ask for.

    With all that the cut needs comes what the goal came to, as JSON types; empty without one.
    """
    if known.plan is not None:
        _check_plan(job.source, known.plan)
        return _repaired_by(job, PruningResult(known.plan)), {}
    statistics = known.statistics
    if statistics is not None:
        statistics = fitting_statistics(job.source, statistics)
    else:
        check_can_be_compared(job)
        if isinstance(job.settings.goal, TargetSpeedup):
            _drawn(job)  # before models are timed
    job, constraint = constraint_of(job)
    drawn = _drawn(job) if statistics is None or job.budget.compares else None
    count = None if drawn is None else len(drawn.tokens_NT)
    announce(job.source, job.settings, count, known.told)
    if statistics is None:
        if job.settings.repairs and job.budget.channel_parts and not constraint.needs_statistics:
            return _choose_and_repair(job, constraint)
        windows = job.draw()
        if job.budget.parts == job.budget.whole_parts:
            windows = few_windows(windows, COARSE_WINDOWS)  # nothing that is chosen needs them all
        statistics = _calibrated(job, constraint, windows, "calibrate")
    elif job.budget.compares:
        statistics = _completed(job, constraint, statistics)
    planner, candidate = select(job, constraint, statistics)
    with job.work_dir.watch.stage("plan"):
        plan = planner.plan(candidate)
    warn_of_experts(plan)
    facts = _facts(constraint, candidate)
    result = PruningResult(plan, planner.statistics)
    for ridged in known.ridged:
        if ridged.plan == plan:
            result = replace(result, tensors=ridged.tensors, steps=ridged.steps)
    return _repaired_by(job, result), facts


def decide_together(jobs: Sequence[Job], statistics: Statistics) -> list[PruningResult]:
    """Decide what goes in several prunings of one model and text; the ridge of all is one pass.

    Those that compare plans or repair nothing are left out. See `Known`.
    """
    jobs = [job for job in jobs if job.settings.repairs and not job.budget.compares]
    if not jobs:
        return []
    chosen = [select(job, constraint_of(job)[1], statistics) for job in jobs]
    return ridge_together(
        jobs[0], [planner.plan(candidate) for planner, candidate in chosen], _drawn(jobs[0])
    )


def _drawn(job: Job) -> Windows:
    """Draw the windows: what is wrong with the text is said before any work."""
    windows = job.draw()
    if job.settings.repairs:
        check_windows(windows)
    return windows


def plan_from(source: WeightSource, statistics: Statistics, settings: PruneSettings) -> PruningPlan:
    """Return the plan that statistics and settings give; no text is read."""

    def no_text() -> Any:
        raise AssertionError("statistics are there, so no text is read")

    if settings.budget.compares:
        needed = "the model and a text; make the plan with cfsp prune"
        raise cannot_be_tried(settings.budget, needed)
    with temporary_work_dir(settings.compute.memory_budget) as work_dir:
        runtime = runtime_of(settings.compute, source)
        # Without a text nothing is tried.
        settings = replace(settings.suited_to_repair(), repair="none", leaves_parts_open=False)
        job = Job(source, settings, no_text, no_text, runtime, work_dir)
        return decide(job, Known(statistics))[0].plan


def _facts(constraint: Constraint, candidate: Candidate) -> dict[str, Any]:
    """Return what a goal came to, as JSON types; empty without one."""
    facts = constraint.facts()
    return {**facts, "chosen": asdict(candidate)} if facts else {}


def _repaired_by(job: Job, result: PruningResult) -> PruningResult:
    """Repair what a plan leaves, if there is anything to repair."""
    if not needed_steps(job.settings.repair, result.plan):
        return result
    windows = job.draw()
    check_windows(windows)
    return repair(job, result, windows)


def _check_plan(source: WeightSource, plan: PruningPlan) -> None:
    """Check that a plan that was made before is of this model, which can do without what goes."""
    plan.check_fits(source)
    check_can_go(source, Dropped(plan.removed_blocks, plan.removed_attentions))
    if plan.kept_experts is not None:
        check_experts_can_go(source, plan.experts_of_blocks, plan.removed_blocks)
    PrunedSource(source, plan)  # it can be written


def _calibrated(job: Job, constraint: Constraint, seen: Windows, name: str) -> Statistics:
    """Let windows pass the blocks, and measure what else candidates are made from."""
    with job.work_dir.watch.stage(name):
        statistics = calibrate(job, seen, name, runs=follow_runs(job))
    return _completed(job, constraint, statistics)


def _completed(job: Job, constraint: Constraint, statistics: Statistics) -> Statistics:
    """Add the order in which blocks go and their sensitivity, where candidates need them."""
    windows = job.draw()
    if follow_divergence(job):
        statistics = with_order(job, statistics, windows, [constraint.to_drop()])
    if job.budget.channel_parts:
        statistics = with_needed_sensitivity(job, statistics, windows)
    return statistics


def _choose_and_repair(job: Job, constraint: Constraint) -> tuple[PruningResult, dict[str, Any]]:
    """Fix the widths from a few windows, then choose and repair in one pass over all."""
    windows = job.draw()
    few = few_windows(windows, COARSE_WINDOWS)
    coarse = _calibrated(job, constraint, few, "coarse pass")
    planner, candidate = select(job, constraint, coarse)
    widths = planner.widths(candidate)
    with job.work_dir.watch.stage("ridge"):
        wanted = Wanted(widths.kept_U, candidate.dropped.blocks)
        (chosen,) = choose_and_repair(job, windows, [wanted])
    record = calibration_record(job, windows)
    seen = Statistics.of([each.observed for each in chosen], record)
    # What else was measured of the model holds.
    statistics = replace(planner.statistics, blocks=seen.blocks, units=seen.units, record=record)
    kept = [kept_K for block in chosen for kept_K in block.kept]
    plan = replace(planner, statistics=statistics).assemble(candidate, widths, kept)
    warn_of_experts(plan)
    result = with_ridge(job, PruningResult(plan, statistics), chosen)
    return repair(job, result, windows), _facts(constraint, candidate)

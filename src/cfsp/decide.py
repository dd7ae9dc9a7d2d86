"""What goes, and the repair of what is left: from a job to all that the cut needs.

a plan is given          repair by it
statistics are there     select -> plan -> repair
nothing is, no repair    calibrate -> select -> plan
nothing is, with repair  a coarse pass over a few windows -> select -> one pass over all windows
                         that chooses the channels and repairs, block by block
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cfsp.calibration.calibrate import calibrate, calibration_record
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.stock_keys import warn_of_rhythm
from cfsp.cut.surgery import PrunedSource
from cfsp.job import Job
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.importance import COARSE_WINDOWS, warn_of_experts
from cfsp.planning.make import Planner, UnitWidths, fitting_statistics
from cfsp.planning.plan_file import PruningPlan
from cfsp.pruning_cost import announce, doubts, say_doubts
from cfsp.repair.ladder import check_windows, repair, steps_left
from cfsp.repair.result import PruningResult
from cfsp.repair.ridge_pass import choose_and_repair, narrowed_units, with_ridge
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
    """What is known of a pruning before it begins: one of the first three, or nothing."""

    statistics: Statistics | None = None  # of an earlier run on the model
    plan: PruningPlan | None = None  # excludes a goal
    decided: PruningResult | None = None  # beside other prunings; see `decide_together`
    # What else its manifest is to say, which decides nothing.
    noted: Mapping[str, Any] = field(default_factory=dict)


NOTHING_KNOWN = Known()


@dataclass(frozen=True)
class _Selected:
    """What is to go in one pruning, and what makes its plan."""

    job: Job
    constraint: Constraint
    planner: Planner
    candidate: Candidate
    # Where the ridge pass is to choose the channels; statistics are those of a coarse pass.
    widths: UnitWidths | None


def decide(job: Job, known: Known = NOTHING_KNOWN) -> tuple[PruningResult, dict[str, Any]]:
    """Decide what stays, and repair it; return with it what the goal came to, as JSON types."""
    if known.plan is not None:
        _check_plan(job.source, known.plan)
        return _repaired_by(job, PruningResult(known.plan)), {}
    if known.decided is not None:
        return _repaired_by(job, known.decided), {}
    ((result, facts),) = _decided([_selected(job, statistics=known.statistics)])
    return _repaired_by(job, result), facts


def decide_together(jobs: Sequence[Job]) -> list[PruningResult]:
    """Decide what goes in several prunings of one model, by one text, in one work directory.

    What is measured of the model is measured once, and the ridge of all is one pass. Doubts are
    left to who asks.
    """
    most = max(jobs, key=lambda job: job.budget.sparsity)
    selected = [_selected(job, beside=most) for job in jobs]
    return [result for result, _ in _decided(selected)]


def _selected(
    job: Job, *, statistics: Statistics | None = None, beside: Job | None = None
) -> _Selected:
    """Return what meets the target, by statistics that are there or are made.

    They are to serve another one, too, where there is one beside it, in which most goes.
    """
    is_known = statistics is not None
    if statistics is not None:
        statistics = fitting_statistics(job.source, statistics)
    else:
        check_can_be_compared(job)
        if isinstance(job.settings.goal, TargetSpeedup):
            _drawn(job)  # before models are timed
    job, constraint = constraint_of(job)
    reads_text = not is_known or job.budget.compares
    count = len(_drawn(job).tokens_NT) if reads_text else None
    announce(job.source, job.settings)
    if beside is None:
        say_doubts(doubts(job.source, job.settings, count))
    repairs_channels = job.settings.repairs and bool(job.budget.channel_parts)
    chooses = repairs_channels and not is_known and not constraint.needs_statistics
    if statistics is None:
        windows = job.draw()
        if chooses or job.budget.parts == (job.budget.whole_part,):
            windows = few_windows(windows, COARSE_WINDOWS)  # nothing that is chosen needs them all
        name = "coarse pass" if chooses else "calibrate"
        with job.work_dir.watch.stage(name):
            statistics = calibrate(job, windows, name, runs=follow_runs(job))
    if reads_text and follow_divergence(job):
        most = constraint if beside is None else constraint_of(beside)[1]
        statistics = with_order(job, statistics, most.to_drop())
    if reads_text and job.budget.channel_parts:
        statistics = with_needed_sensitivity(job, statistics)
    planner, candidate = select(job, constraint, statistics)
    widths = planner.widths(candidate) if chooses else None
    if widths is not None and not narrowed_units(job.source, [widths.kept_U]):
        widths = None  # whole blocks are enough
    return _Selected(job, constraint, planner, candidate, widths)


def _decided(selected: Sequence[_Selected]) -> list[tuple[PruningResult, dict[str, Any]]]:
    """Return plans, with the ridge step where that chose the channels, and what goals came to."""
    to_choose = [(each, each.widths) for each in selected if each.widths is not None]
    chosen = iter(_chosen_and_repaired(to_choose))
    found = []
    for each in selected:
        if each.widths is not None:
            result = next(chosen)
        else:
            with each.job.work_dir.watch.stage("plan"):
                plan = each.planner.plan(each.candidate)
            result = PruningResult(plan, each.planner.statistics)
        warn_of_experts(result.plan)
        source = each.job.source
        gone = result.plan.removed_blocks
        warn_of_rhythm(source.config, gone, source.architecture.block_count)
        facts = each.constraint.facts()
        found.append((result, facts and {**facts, "chosen": asdict(each.candidate)}))
    return found


def _chosen_and_repaired(
    selected: Sequence[tuple[_Selected, UnitWidths]],
) -> list[PruningResult]:
    """Choose the channels of widths that are known, and repair, in one pass over all windows."""
    if not selected:
        return []
    job, results = selected[0][0].job, []
    windows = job.draw()
    with job.work_dir.watch.stage("ridge"):
        chosen = choose_and_repair(job, windows, [own.kept_U for _, own in selected])
    record = calibration_record(job, windows)
    seen = Statistics.of([each.observed for each in chosen[0]], record)
    for number, ((each, own), blocks) in enumerate(zip(selected, chosen, strict=True)):
        # What else was measured of the model holds.
        statistics = replace(
            each.planner.statistics, blocks=seen.blocks, units=seen.units, record=record
        )
        kept = [kept_K for block in blocks for kept_K in block.kept]
        plan = replace(each.planner, statistics=statistics).assemble(each.candidate, own, kept)
        result = PruningResult(plan, statistics, repaired_on=record)
        results.append(with_ridge(job, result, blocks, number))
    return results


def _drawn(job: Job) -> Windows:
    """Draw the windows: what is wrong with the text is said before any work."""
    windows = job.draw()
    if job.settings.repairs:
        check_windows(len(windows.tokens_NT))
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


def _repaired_by(job: Job, result: PruningResult) -> PruningResult:
    """Repair what a plan leaves, if there is anything left to repair."""
    if not steps_left(job.settings.repair, result):
        return result
    windows = _drawn(job)
    result = replace(result, repaired_on=calibration_record(job, windows))
    return repair(job, result, windows)


def _check_plan(source: WeightSource, plan: PruningPlan) -> None:
    """Check that a plan that was made before is of this model, which can do without what goes."""
    plan.check_fits(source)
    check_can_go(source, Dropped(plan.removed_blocks, plan.removed_attentions))
    if plan.kept_experts is not None:
        check_experts_can_go(source, plan.experts_of_blocks, plan.removed_blocks)
    PrunedSource(source, plan)  # it can be written

"""The steps of repair, in their order: each takes a decision and what was repaired so far.

none
ridge       every down projection, by least squares on the dense model's hidden states; then the
            blocks beside what was dropped, on the pruned model's own
sequential  the ridge; then every down projection on the pruned model's own hidden states
"""

from __future__ import annotations

from cfsp.errors import TextError
from cfsp.job import Job
from cfsp.repair import ridge_pass, sequential
from cfsp.repair.result import PruningResult
from cfsp.settings import Repair
from cfsp.text.windows import Windows

STEPS: dict[Repair, tuple[str, ...]] = {
    "none": (),
    "ridge": (ridge_pass.NAME, sequential.GAPS),
    "sequential": (ridge_pass.NAME, sequential.NAME),
}


def steps_left(repair: Repair, result: PruningResult) -> list[str]:
    """Return the steps of a repair that a plan gives something to do, but for those taken.

    The ridge has nothing to do where units stay as they are or go whole; nothing that stays could
    take over what experts did that go.
    """
    plan, taken = result.plan, {step["name"] for step in result.steps}
    is_needed = {
        ridge_pass.NAME: plan.narrows,
        sequential.NAME: plan.narrows or plan.has_gaps,
        sequential.GAPS: plan.has_gaps,
    }
    return [name for name in STEPS[repair] if is_needed[name] and name not in taken]


def repair(job: Job, result: PruningResult, windows: Windows) -> PruningResult:
    """Take the steps that the settings ask for, the plan needs, and that were not taken yet."""
    for name in steps_left(job.settings.repair, result):
        with job.work_dir.watch.stage(name):
            if name == ridge_pass.NAME:
                (result,) = ridge_pass.repair_by_plans(job, [result], windows)
            else:
                result = sequential.repair_drift(name, job, result, windows)
    return result


def check_windows(count: int) -> None:
    """Check that there are enough windows for the steps."""
    if count < 2:
        raise TextError(
            "repair needs at least 2 windows, one of them held out, found 1; give more text, more "
            "--samples or shorter windows (--seqlen), or --effort fast"
        )

"""The steps of repair, in their order: each takes a decision and what was repaired so far.

none
ridge    every down projection, by least squares on the dense model's hidden states; then the
         blocks beside what was dropped, on the pruned model's own
local    the ridge; every down projection on the pruned model's own hidden states; then a few
         blocks at a time are trained
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cfsp.calibration.together import check_enough
from cfsp.errors import TextError, UnsupportedModelError
from cfsp.repair import local, ridge_pass, sequential
from cfsp.repair.local import repair_locally
from cfsp.repair.result import PruningResult
from cfsp.repair.ridge_pass import repair_by_plan
from cfsp.repair.sequential import TOKENS_IN_BATCH, repair_gaps, repair_sequentially
from cfsp.streaming.two_streams import TwoStreams

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.job import Job
    from cfsp.planning.make import Planner
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.settings import PruneSettings, Repair
    from cfsp.text.windows import Windows

Step = Callable[["Job", PruningResult, "Windows"], PruningResult]

_STEPS: dict[Repair, dict[str, Step]] = {
    "none": {},
    "ridge": {ridge_pass.NAME: repair_by_plan, sequential.GAPS: repair_gaps},
    "local": {
        ridge_pass.NAME: repair_by_plan,
        sequential.NAME: repair_sequentially,
        local.NAME: repair_locally,
    },
}


def steps_of(repair: Repair) -> dict[str, Step]:
    """Return the steps of a repair, by name, in their order."""
    return _STEPS[repair]


def repair(job: Job, result: PruningResult, windows: Windows) -> PruningResult:
    """Take the steps that the settings ask for and that were not taken yet.

    Raises:
        CfspError: as the steps do.
    """
    taken = {step.name for step in result.steps}
    for name, step in steps_of(job.settings.repair).items():
        if name in taken or (name == sequential.GAPS and not result.plan.has_gaps):
            continue
        with job.place.watch.stage(name):
            result = step(job, result, windows)
    return result


def repaired_a_little(
    job: Job, planner: Planner, plan: PruningPlan, windows: Windows
) -> PruningResult:
    """Repair what a plan leaves by least squares, to see what it is worth then."""
    result = repair_by_plan(job, PruningResult(plan, planner.statistics), windows)
    return repair_gaps(job, result, windows) if plan.has_gaps else result


def check_windows(job: Job, windows: Windows) -> None:
    """Check that there are enough windows for the steps, and for every process.

    Raises:
        TextError: there are too few.
    """
    if len(windows.tokens_NT) < 2:
        raise TextError(
            "repair needs at least 2 windows, one of them held out, found 1; give more text, more "
            "--samples or shorter windows (--seqlen), or --effort fast"
        )
    if job.settings.repair == "local":
        for tokens in (TOKENS_IN_BATCH, job.settings.local.tokens):
            streams = TwoStreams.of(windows, tokens, job.place.team)
            check_enough(windows, streams.team, streams.batch)


def check_can_be_repaired(source: WeightSource, settings: PruneSettings) -> None:
    """Check that a model's blocks can be repaired as the settings ask for.

    Raises:
        UnsupportedModelError: some have experts or several FFN units, and more than the ridge is
            asked for.
    """
    if settings.repair != "local":
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

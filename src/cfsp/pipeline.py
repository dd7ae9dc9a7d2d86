"""The whole flow, one line a stage.

    text -> windows -> CALIBRATE -> Statistics -> SELECT -> Candidate -> PLAN -> PruningPlan
         -> REPAIR -> PruningResult -> CUT -> checkpoint directory

`prune_checkpoint` goes from directory to directory, `prune_model` from a model in memory to a
smaller one. `cfsp.prune_and_recover` trains what the first gives.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cfsp.calibration.calibrate import calibrate, check_length, check_tokens
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.output import check_is_outside, check_output_is_free, staged_directory
from cfsp.checkpoint.own_files import (
    PLAN_FILE,
    STATISTICS_FILE,
    copy_travelling_files,
    digests_beside_weights,
)
from cfsp.checkpoint.reading import Checkpoint, WeightSource, in_memory
from cfsp.checkpoint.tensor_file import write_shards
from cfsp.checkpoint.text_config import text_config_of
from cfsp.cut.surgery import PrunedSource, build_pruned_model
from cfsp.decide import NOTHING_KNOWN, Known, decide, decide_together
from cfsp.errors import OutputError
from cfsp.exports.gguf_architecture import warn_of_no_way_back
from cfsp.job import Job
from cfsp.planning.importance import COARSE_WINDOWS
from cfsp.planning.plan_file import PruningPlan
from cfsp.processes import Team
from cfsp.quality.evaluate import evaluation_windows, perplexity_by_text
from cfsp.quality.perplexity import before_and_after
from cfsp.repair.ladder import check_windows
from cfsp.repair.result import PruningResult
from cfsp.result.card import write_record
from cfsp.result.manifest import digest_of_plan, facts_for_config, history_of
from cfsp.result.prune_report import PruneReport, prune_report
from cfsp.selection.constraint import Share, half_dropped
from cfsp.selection.divergence import with_needed_sensitivity
from cfsp.selection.drop_order import (
    check_can_be_compared,
    follow_divergence,
    follow_runs,
    with_order,
)
from cfsp.selection.goal import loss_increase_of
from cfsp.settings import (
    DEFAULT_PARTS,
    Budget,
    MaxLossIncrease,
    PruneSettings,
    by_flag,
)
from cfsp.streaming.block_stream import check_enough
from cfsp.streaming.runtime import check_same_work, runtime_identity, runtime_of
from cfsp.streaming.work_dir import (
    WorkDir,
    output_work_dir,
    remove_finished_work,
    temporary_work_dir,
)
from cfsp.text.drawing import calibration_windows, checked_beginning
from cfsp.text.tokenizers import check_tokenizer, load_tokenizer
from cfsp.text.windows import Windows, digests_of

log = logging.getLogger(__name__)


def prune_checkpoint(
    source: Checkpoint,
    out: Path,
    settings: PruneSettings,
    *,
    known: Known = NOTHING_KNOWN,
    dry_run: bool = False,
    command: str = "",
    team: Team | None = None,
) -> PruneReport:
    """Prune a checkpoint into a new directory; after an error nothing is left behind.

    A dry run decides without repair and writes only the plan. Several processes share the windows;
    the first chooses, solves and writes, and the others need to see its directories.
    """
    team = team or Team()
    check_output(source, out)
    history = history_of(source)  # damage is no surprise after the work
    asked = settings.suited_to_repair()
    settings = replace(asked, repair="none") if dry_run else asked
    if known.plan is None:
        warn_of_no_way_back(source, settings.budget)
    measured_on = evaluation_windows(settings.evaluation, source)
    asked_for = pruning_identity(settings, known)
    # What is decided before the first pass depends on these too.
    runtime, of_model = runtime_of(settings.compute, source), {"dense model": source.identity}
    identity = of_model | runtime_identity(runtime) | asked_for
    with (
        output_work_dir(out, identity, settings.compute.memory_budget, team) as work_dir,
        _shared_staging(out, work_dir) as staging,
    ):
        text = digest_of(digests_of(measured_on))
        same = {"command": digest_of(asked_for), "evaluation text": text}
        check_same_work(team, [source], [runtime], same)

        def measure(model: Checkpoint, name: str) -> dict[str, dict[str, Any]]:
            if not measured_on or dry_run:
                return {}
            with work_dir.watch.stage("evaluate"):
                return perplexity_by_text(model, measured_on, settings.compute, work_dir, name)

        before = measure(source, "dense")  # one that has no loss fails before the work
        tokenizer = partial(load_tokenizer, source.directory)
        repaired, facts = decide(_job(source, tokenizer, settings, work_dir), known)
        if dry_run:
            if asked.repairs and known.plan is None:
                _say_what_repair_may_change(repaired.plan, asked, known)
            if team.is_first:
                repaired.plan.save(staging / PLAN_FILE)
            return prune_report(source, repaired, facts, {}, work_dir, None)
        with work_dir.watch.stage("cut"):
            digests = team.from_first(lambda: _write_checkpoint(source, repaired, staging))
            # Also where nothing is measured: what cannot be read again is not left behind.
            pruned = Checkpoint(staging, "the pruned model")
        measured = before_and_after(before, measure(pruned, "pruned"))
        if isinstance(settings.goal, MaxLossIncrease):
            with work_dir.watch.stage("evaluate"):
                dense = float(facts["conditions"]["dense_loss"])
                facts["result"] = loss_increase_of(staging, dense, settings)
        report = prune_report(source, repaired, facts, measured, work_dir, out)
        manifest = {**report.to_manifest(digests, command, history), **known.noted}
        team.from_first(lambda: write_record(staging, manifest, repaired.plan, source))
    return report


def check_output(source: Checkpoint, out: Path) -> None:
    """Check, before any work, that a smaller model can be written to a directory."""
    check_is_outside(out, source.directory)
    remove_finished_work(out)
    check_output_is_free(out)


def check_beforehand(source: Checkpoint, out: Path | None, settings: PruneSettings) -> None:
    """Refuse and warn as a pruning of a share does before a pass, whatever its text holds."""
    if out is not None:
        check_is_outside(out, source.directory)
        check_output_is_free(out)
    history_of(source)
    warn_of_no_way_back(source, settings.budget)
    Share(source, settings.budget).check()
    checked_beginning(settings.text, load_tokenizer(source.directory))
    if settings.repairs:
        check_windows(settings.text.windows)
    check_length(source.config, settings.text.seqlen, source.label)


def _say_what_repair_may_change(plan: PruningPlan, asked: PruneSettings, known: Known) -> None:
    """Warn of a plan that was made without the repair of the run itself."""
    budget = Budget(parts=tuple(plan.criterion.get("parts", DEFAULT_PARTS)))
    if budget.compares:
        log.warning(
            "--dry-run compared plans before repair; the run itself repairs a few of them and may "
            "choose another"
        )
    elif known.statistics is None and asked.text.windows > COARSE_WINDOWS and budget.channel_parts:
        log.warning(
            f"--dry-run takes widths from all windows, the run itself from {COARSE_WINDOWS} of "
            "them before it repairs: some blocks may keep a few channels more or less"
        )


@contextmanager
def _shared_staging(out: Path, work_dir: WorkDir) -> Iterator[Path]:
    """Give the directory that the first process writes into, which all need to see."""
    team = work_dir.team
    with staged_directory(out) if team.is_first else nullcontext() as own:
        staging = team.from_first(lambda: own)
        assert staging is not None
        unseen = [rank for rank, sees in enumerate(team.gather(staging.is_dir())) if not sees]
        if unseen:
            raise OutputError(
                f"process {unseen[0]} does not see {staging}, where process 0 works; choose an "
                "output on a file system that all processes share"
            )
        yield staging


def prune_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PruneSettings
) -> PreTrainedModel:
    """Prune a model in memory into a new one that shares every unpruned tensor with it."""
    settings = settings.suited_to_repair()
    check_tokenizer(tokenizer)
    source = in_memory(model, settings.budget.parts)
    with temporary_work_dir(settings.compute.memory_budget) as work_dir:
        history = history_of(source)
        repaired, goal = decide(_job(source, lambda: tokenizer, settings, work_dir))
        report = prune_report(source, repaired, goal, {}, work_dir, None)
        facts = facts_for_config(report.to_manifest({}, "cfsp.prune", history))
        return build_pruned_model(source, repaired.plan, repaired.tensors, facts)


def calibrate_source(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    settings: PruneSettings,
    work_dir: WorkDir | None = None,
) -> Statistics:
    """Draw windows, run them through the model once, and measure what else prunings need.

    In which order blocks or attention layers go is measured up to half; where widths may follow the
    sensitivity of blocks, that is.
    """
    own: AbstractContextManager[WorkDir] = temporary_work_dir(settings.compute.memory_budget)
    with own if work_dir is None else nullcontext(work_dir) as work_dir:
        job = _job(source, lambda: tokenizer, settings.suited_to_repair(), work_dir)
        budget = digest_of({"budget": repr(job.budget)})
        check_same_work(work_dir.team, [source], [job.runtime], {"command": budget})
        check_can_be_compared(job)
        windows = job.draw()
        with work_dir.watch.stage("calibrate"):
            statistics = calibrate(job, windows, runs=follow_runs(job))
        if follow_divergence(job):
            statistics = with_order(job, statistics, half_dropped(source, job.budget))
        return with_needed_sensitivity(job, statistics) if job.budget.channel_parts else statistics


def decide_all(
    source: Checkpoint, prunings: Sequence[PruneSettings], work_dir: WorkDir
) -> list[PruningResult]:
    """Decide what goes in several prunings by one text, for `Known`; see `decide_together`."""
    tokenizer = partial(load_tokenizer, source.directory)
    asked = [each.suited_to_repair() for each in prunings]
    first = _job(source, tokenizer, asked[0], work_dir)
    return decide_together([replace(first, settings=each) for each in asked])


def _job(
    source: WeightSource,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    settings: PruneSettings,
    work_dir: WorkDir,
) -> Job:
    """Return a job whose windows are drawn once, and only if something needs them."""
    runtime, tokenizer = runtime_of(settings.compute, source), cache(tokenizer)

    @cache
    def draw() -> Windows:
        with work_dir.watch.stage("text"):
            windows = calibration_windows(tokenizer(), settings.text)
        # All of them, and now: many a pass has a few, or begins after long work.
        check_tokens(source.config, windows.tokens_NT, source.label)
        work_dir.team.check_same({"calibration text": windows.digest})
        check_enough(windows, work_dir.team, runtime.batch_windows)
        return windows

    return Job(source, settings, tokenizer, draw, runtime, work_dir)


def _write_checkpoint(source: Checkpoint, repaired: PruningResult, target: Path) -> dict[str, str]:
    """Write all but manifest and model card; return the digests of the files."""
    repaired.plan.save(target / PLAN_FILE)
    if repaired.statistics is not None:
        repaired.statistics.save(target / STATISTICS_FILE)
    pruned = PrunedSource(source, repaired.plan, repaired.tensors)
    digests = write_shards(target, pruned.outgoing())
    pruned.changes.write(source, target)
    _warn_of_prediction(source, pruned, repaired.plan)
    copy_travelling_files(source.directory, target)
    return digests | digests_beside_weights(target)


def _warn_of_prediction(source: Checkpoint, pruned: PrunedSource, plan: PruningPlan) -> None:
    """Tell people that layers of multi-token prediction go, or do not fit the config's numbers."""
    behind, text = source.stored.behind(source.architecture), text_config_of(source.config)
    if behind and plan.removed_blocks:
        log.warning(
            "the layers of multi-token prediction (%s and others) are not in the smaller model: "
            "they go with blocks, after all of which they were trained",
            behind[0],
        )
    elif behind and any(getattr(text, k, None) != v for k, v in pruned.changes.text.items()):
        log.warning(
            "the config of the smaller model no longer describes the layers of multi-token "
            "prediction (%s and others): generate without use_mtp, and serve without speculative "
            "decoding by them",
            behind[0],
        )


def pruning_identity(settings: PruneSettings, known: Known) -> dict[str, Any]:
    """Return what the result depends on besides model, text and computing; for resuming."""
    return {
        "command": "prune",
        "--bos": settings.text.bos,
        "--repair": settings.repair,
        "--plan": known.plan and digest_of_plan(known.plan),
        **by_flag(settings.budget),
        "parts are open": settings.leaves_parts_open,
        "goal": settings.goal and by_flag(settings.goal),
        **by_flag(settings.criterion),
        "--statistics": known.statistics and known.statistics.digest,
    }


def digest_of(identity: dict[str, Any]) -> str:
    """Return what two identities are compared by where they lie in a file."""
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]

"""The whole flow, one line a stage.

    text -> windows -> CALIBRATE -> Statistics -> PLAN -> PruningPlan
         -> REPAIR -> Repaired -> CUT -> checkpoint directory

`prune_checkpoint` goes from directory to directory, `prune_and_recover` also trains what it gives,
`prune_model` goes from a model in memory to a smaller one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.calibration.statistics import Statistics
from cfsp.calibration.together import calibrate_together, check_enough, check_same_work
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.modeling_code import code_digests
from cfsp.checkpoint.output import (
    check_is_outside,
    check_output_is_free,
    created_parents,
    staged_directory,
)
from cfsp.checkpoint.own_files import PLAN_FILE, STATISTICS_FILE
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource, fingerprint
from cfsp.checkpoint.writing import copy_travelling_files, write_config
from cfsp.cut.in_memory import build_pruned_model
from cfsp.cut.surgery import write_pruned_weights
from cfsp.engine.compute import Engine, engine_of
from cfsp.engine.stopwatch import Stopwatch
from cfsp.engine.workplace import (
    Workplace,
    output_workplace,
    remove_finished_work,
    temporary_workplace,
)
from cfsp.errors import OutputError
from cfsp.goals.loss import loss_increase_of
from cfsp.goals.resolve import resolve_goal
from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.removal_budget import whole_in_words
from cfsp.processes import Team, process_count
from cfsp.quality.evaluate import before_and_after, evaluation_windows
from cfsp.recovery.adaptation import check_installed
from cfsp.recovery.memory import method_that_fits
from cfsp.recovery.settings import AUTO_TEACHER, Adaptation, Distillation, Limit, Training
from cfsp.recovery.teacher import choose_teacher
from cfsp.repair.ladder import check_can_be_repaired, plan_and_repair
from cfsp.repair.repaired import Repaired
from cfsp.result.card import model_card
from cfsp.result.manifest import (
    add_to_manifest,
    describe_pruning,
    facts_for_config,
    read_manifest,
    write_manifest,
)
from cfsp.result.origin import CARD_FILE, origin_of
from cfsp.result.prune_report import PruneReport, prune_report
from cfsp.settings import (
    BEST_WITHOUT_TRAINING,
    CalibrationText,
    Compute,
    Criterion,
    EvaluationText,
    Goal,
    MaxLossIncrease,
    PruneSettings,
)
from cfsp.text.image_windows import parted
from cfsp.text.sources import check_texts
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows, check_is_text
from cfsp.whole_model.own_text import calibration_windows
from cfsp.whole_model.removal_order import (
    check_can_be_compared,
    follow_runs,
    with_needed_removals,
)
from cfsp.whole_model.sensitivity import with_sensitivity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.recovery.recover_report import RecoverReport

log = logging.getLogger(__name__)

# The digest of what a run was asked for, in the manifest of the pruned model that it trains.
_ASKED = "asked_digest"


def prune_checkpoint(
    source: Checkpoint,
    out: Path,
    settings: PruneSettings,
    *,
    goal: Goal | None = None,
    statistics: Statistics | None = None,
    plan: PruningPlan | None = None,
    evaluation: EvaluationText | None = None,
    dry_run: bool = False,
    command: str = "",
    team: Team | None = None,
) -> PruneReport:
    """Prune a checkpoint into a new directory.

    Several processes share the windows. The first chooses, solves and writes; the others need to
    see its directories.

    Args:
        source: the model.
        out: where the smaller model goes; must not exist, or be empty.
        settings: how to prune.
        goal: gives the budget; of that in the settings only the multiple then counts.
        statistics: of an earlier calibration of this model.
        plan: an earlier decision for this model; excludes a goal.
        evaluation: texts to measure perplexity on, before and after.
        dry_run: decide without repair and write only the plan.
        command: what the user typed, for the manifest.
        team: the processes that prune together; None for this one alone.

    Raises:
        CfspError: anything that a user can cause; nothing is left behind.
    """
    team = team or Team()
    check_all_texts(settings.text, evaluation, goal)
    check_is_outside(out, source.directory)
    remove_finished_work(out)
    check_output_is_free(out)
    settings = settings.with_suitable_metric()
    if dry_run:
        if settings.budget.leaves_number_open and settings.repair != "none" and plan is None:
            log.warning(
                "--dry-run compares before repair how many %s go; the run itself repairs a few of "
                "the numbers, and may choose another",
                whole_in_words(settings.budget),
            )
        settings = settings.without_repair()
    check_can_be_repaired(source, settings)
    watch = Stopwatch()
    measured_on = evaluation_windows(evaluation, source)
    identity = _identity(settings, statistics, plan, goal)
    with (
        created_parents(out),
        output_workplace(out, identity, settings.compute.memory_budget, team) as place,
        _shared_staging(out, place) as staging,
    ):
        check_same_work(team, [source], {"command": _digest(identity)})
        inputs = _Inputs.of(source, lambda: load_tokenizer(source.directory), settings, team=team)
        decided = _decide(inputs, settings, goal, statistics, plan, place, watch)
        repaired, facts = decided.repaired, decided.goal
        if dry_run:
            if team.is_first:
                repaired.plan.save(staging / PLAN_FILE)
            return prune_report(source, repaired, facts, {}, watch, place, None)
        with watch.stage("cut"):
            digests = team.from_first(lambda: _write_checkpoint(source, repaired, staging))
        with watch.stage("evaluate"):
            pruned = Checkpoint(staging, "the pruned model")
            measured = before_and_after(source, pruned, measured_on, settings.compute, place)
            if isinstance(goal, MaxLossIncrease):
                dense = float(facts["conditions"]["dense_loss"])
                facts["result"] = loss_increase_of(staging, goal, dense, settings)
        report = prune_report(source, repaired, facts, measured, watch, place, out)

        def describe() -> None:
            manifest = describe_pruning(repaired.plan, report.to_json(), digests, command)
            write_manifest(staging, manifest)
            card = model_card(manifest, repaired.plan, origin_of(source))
            (staging / CARD_FILE).write_text(card, encoding="utf-8")

        team.from_first(describe)
    return report


def best_effort(source: Checkpoint, settings: PruneSettings) -> tuple[PruneSettings, Limit | None]:
    """Return how to prune with the best effort, and how long to train afterwards.

    That is one pass over the text with the dense model as the teacher, where one process has
    memory for both; else no end-to-end training, and local repair. People are told which.
    """
    device = compute_device(settings.compute.device)
    if process_count() > 1:
        why = "several processes prune together; cfsp recover trains what they give"
    elif method_that_fits(source, device) is None:
        why = "there is no memory to train the whole model beside the dense one"
    else:
        log.info("best effort: repair by ridge, then one pass of training towards the dense model")
        return settings, Limit(epochs=1)
    log.info("best effort: repair by %s, because %s", BEST_WITHOUT_TRAINING, why)
    return replace(settings, repair=BEST_WITHOUT_TRAINING), None


def prune_and_recover(
    source: Checkpoint,
    out: Path,
    settings: PruneSettings,
    limit: Limit,
    *,
    goal: Goal | None = None,
    statistics: Statistics | None = None,
    plan: PruningPlan | None = None,
    evaluation: EvaluationText | None = None,
    command: str = "",
) -> tuple[PruneReport, RecoverReport]:
    """Prune a checkpoint, then train the result on the same texts towards the dense model.

    The pruned model stays in `OUT-pruned`. A call that was killed while it trained goes on there.

    Args:
        source: the model.
        out: where the trained model goes; must not exist, or be empty.
        settings: how to prune.
        limit: how long to train.
        goal: as for `prune_checkpoint`, like all that follow.
        statistics: of an earlier calibration.
        plan: an earlier decision.
        evaluation: texts to measure perplexity on, before and after each of the two.
        command: what the user typed.

    Raises:
        CfspError: anything that a user can cause.
    """
    # It imports the Trainer, and with it much that pruning alone does without.
    from cfsp.recovery.recover import recover_checkpoint

    remove_finished_work(out)
    check_output_is_free(out)
    compute, text = settings.compute, settings.text
    device = compute_device(compute.device)
    method = method_that_fits(source, device) or "lora"
    check_installed(method)
    pruned = out.with_name(f"{out.name}-pruned")
    asked = {
        **_identity(settings, statistics, plan, goal),
        "model": fingerprint(source),
        "text": repr(text),
        "dtype": compute.dtype,
    }
    if _was_pruned(pruned, _digest(asked)):
        log.info("%s was pruned before by the same command; going on from it", pruned)
        report = PruneReport.of_checkpoint(pruned)
    else:
        report = prune_checkpoint(
            source,
            pruned,
            settings,
            goal=goal,
            statistics=statistics,
            plan=plan,
            evaluation=evaluation,
            command=command,
        )
        add_to_manifest(pruned, {_ASKED: _digest(asked)})
    training = Training(
        limit, seqlen=min(text.seqlen, Training.seqlen), seed=text.seed, bos=text.bos
    )
    smaller = open_checkpoint(pruned)
    recovery = recover_checkpoint(
        smaller,
        out,
        data=text.names,
        training=training,
        adaptation=Adaptation(method),
        teacher=choose_teacher(AUTO_TEACHER, smaller, method, Distillation(), device),
        evaluation=evaluation,
        # Training in float16 overflows.
        compute=Compute(compute.device, compute.dtype if compute.dtype != "float16" else "auto"),
        command=command,
    )
    return report, recovery


def _was_pruned(directory: Path, asked: str) -> bool:
    manifest = read_manifest(directory) if directory.is_dir() else None
    return manifest is not None and manifest.get(_ASKED) == asked


@contextmanager
def _shared_staging(out: Path, place: Workplace) -> Iterator[Path]:
    """Give the directory that the first process writes into; see `staged_directory`.

    Raises:
        OutputError: a process does not see it.
    """
    team = place.team
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: PruneSettings,
    goal: Goal | None = None,
) -> PreTrainedModel:
    """Prune a model in memory; the original stays as it is.

    Args:
        model: in evaluation mode.
        tokenizer: its own, or the processor that has it.
        settings: how to prune.
        goal: gives the budget; of that in the settings only the multiple then counts.

    Returns:
        A new model that shares every unpruned tensor with the original.
    """
    settings = settings.with_suitable_metric()
    check_all_texts(settings.text, goal=goal)
    source = LoadedModel(model, settings.budget.parts)
    tokenizer, processor = parted(tokenizer)
    with temporary_workplace(settings.compute.memory_budget) as place:
        inputs = _Inputs.of(source, lambda: tokenizer, settings, processor)
        watch = Stopwatch()
        decided = _decide(inputs, settings, goal, None, None, place, watch)
        repaired = decided.repaired
        report = prune_report(source, repaired, decided.goal, {}, watch, place, None)
        manifest = describe_pruning(repaired.plan, report.to_json(), {}, "cfsp.prune")
        facts = facts_for_config(manifest)
        return build_pruned_model(model, source, repaired.plan, repaired.tensors, facts)


def check_all_texts(
    text: CalibrationText, evaluation: EvaluationText | None = None, goal: Goal | None = None
) -> None:
    """Open every text that pruning will read, before any work is done.

    Raises:
        TextError: one is missing or not readable.
    """
    check_texts(text.names, "calibration")
    if evaluation is not None:
        check_texts(evaluation.names, "evaluation")
    if isinstance(goal, MaxLossIncrease):
        check_texts(goal.held_out, "evaluation")


def calibrate_source(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    compute: Compute,
    place: Workplace | None = None,
    *,
    sensitivity: bool | Callable[[Windows], bool] = False,
    removing: Sequence[PruneSettings] = (),
    processor: Any = None,
) -> Statistics:
    """Draw windows and run them through the model once.

    Args:
        source: the model.
        tokenizer: its own.
        text: what to draw from.
        compute: where and in what.
        place: where to spill and to save, and the processes that share the windows; None for a
            temporary one.
        sensitivity: also measure that of every block; in one process only. A function is asked with
            the windows.
        removing: also measure what the removal of blocks needs that these settings ask for.
        processor: of a multimodal model in memory.
    """
    own: AbstractContextManager[Workplace] = temporary_workplace(compute.memory_budget)
    with own if place is None else nullcontext(place) as place:
        engine = engine_of(compute, source)
        check_can_be_compared(source, removing, engine)
        windows = calibration_windows(source, tokenizer, text, engine, processor)
        if callable(sensitivity):
            sensitivity = sensitivity(windows)
        if sensitivity:
            check_is_text(windows, "--sensitivity")
        check_same_work(place.team, [source], {"calibration text": windows.digest})
        check_enough(windows, place.team, engine.batch_windows)
        for each in removing:
            if each.budget.whole_parts:
                check_is_text(windows, f"--parts {','.join(each.budget.whole_parts)}")
        runs = follow_runs(source, removing, engine)
        statistics = calibrate_together(
            source, windows, engine, seed=text.seed, place=place, runs=runs
        )
        statistics = with_needed_removals(source, statistics, windows, removing, engine, place)
        if sensitivity:
            return with_sensitivity(source, statistics, windows, Criterion(), engine)
        return statistics


def _digest(identity: dict[str, Any]) -> str:
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Inputs:
    """A model and its text; windows are drawn once, and only if something needs them."""

    source: WeightSource
    engine: Engine
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    draw: Callable[[], Windows]

    @staticmethod
    def of(
        source: WeightSource,
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        settings: PruneSettings,
        processor: Any = None,
        team: Team | None = None,
    ) -> _Inputs:
        engine, tokenizer = engine_of(settings.compute, source), cache(tokenizer)

        def draw() -> Windows:
            windows = calibration_windows(source, tokenizer(), settings.text, engine, processor)
            if team is not None:
                team.check_same({"calibration text": windows.digest})
                check_enough(windows, team, engine.batch_windows)
            return windows

        return _Inputs(source, engine, tokenizer, cache(draw))


@dataclass(frozen=True)
class _Decided:
    """A complete decision, and what a goal came to, as JSON types."""

    repaired: Repaired
    goal: dict[str, Any]


def _decide(
    inputs: _Inputs,
    settings: PruneSettings,
    goal: Goal | None,
    statistics: Statistics | None,
    plan: PruningPlan | None,
    place: Workplace,
    watch: Stopwatch,
) -> _Decided:
    """Turn a goal into a budget, then decide what goes and repair what is left."""
    facts: dict[str, Any] = {}
    if goal is not None:
        resolution, statistics = resolve_goal(
            goal,
            inputs.source,
            inputs.tokenizer,
            inputs.draw,
            settings,
            place=place,
            watch=watch,
            statistics=statistics,
        )
        settings, facts = replace(settings, budget=resolution.budget), resolution.to_json()
    repaired = plan_and_repair(
        inputs.source,
        inputs.draw,
        settings,
        inputs.engine,
        place=place,
        watch=watch,
        statistics=statistics,
        plan=plan,
    )
    return _Decided(repaired, facts)


def _write_checkpoint(source: Checkpoint, repaired: Repaired, target: Path) -> dict[str, str]:
    """Write all but manifest and model card; return the digests of weights and code."""
    repaired.plan.save(target / PLAN_FILE)
    if repaired.statistics is not None:
        repaired.statistics.save(target / STATISTICS_FILE)
    weights = write_pruned_weights(source, repaired.plan, target, repaired.tensors)
    plan = repaired.plan
    write_config(source, target, plan.kept_widths, plan.removed_blocks, plan.kept_experts)
    copy_travelling_files(source.directory, target)
    return weights.digests | code_digests(target)


def _identity(
    settings: PruneSettings,
    statistics: Statistics | None,
    plan: PruningPlan | None,
    goal: Goal | None,
) -> dict[str, Any]:
    """Return what the result depends on besides model, text and computing; for resuming."""
    return {
        "command": "prune",
        "--bos": settings.text.bos,
        "--repair": settings.repair,
        "local": asdict(settings.local) if settings.repair == "local" else None,
        "--plan": sha256(plan.to_json().encode()).hexdigest() if plan else None,
        **asdict(settings.budget),
        "goal": [type(goal).__name__, asdict(goal)] if goal else None,
        **asdict(settings.criterion),
        "--statistics": statistics.record.tokens_digest if statistics else None,
    }

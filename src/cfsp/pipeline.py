"""The whole flow, one line a stage.

    text -> windows -> CALIBRATE -> Statistics -> PLAN -> PruningPlan
         -> SURGERY (+ RESTORATION) -> checkpoint directory

`prune_checkpoint` goes from directory to directory, `prune_model` from a model in memory to a
smaller one.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.calibration.calibrate import calibration_record
from cfsp.calibration.statistics import Statistics
from cfsp.calibration.together import calibrate_together
from cfsp.checkpoint.modeling_code import code_digests
from cfsp.checkpoint.output import (
    check_is_outside,
    check_output_is_free,
    created_parents,
    staged_directory,
)
from cfsp.checkpoint.own_files import PLAN_FILE, STATISTICS_FILE
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource
from cfsp.checkpoint.writing import copy_travelling_files, write_config
from cfsp.cut.in_memory import build_pruned_model
from cfsp.cut.surgery import added_specs, write_pruned_weights
from cfsp.engine.workplace import (
    Workplace,
    output_workplace,
    remove_finished_work,
    temporary_workplace,
)
from cfsp.goals.goal import Goal, MaxLossIncrease
from cfsp.goals.loss import loss_increase_of
from cfsp.goals.resolve import resolve_goal
from cfsp.planning.coarse import SENSITIVITY
from cfsp.planning.make import Criterion
from cfsp.planning.plan_file import PruningPlan
from cfsp.processes import Team
from cfsp.quality.evaluate import before_and_after
from cfsp.repair.decision import Decision, decide
from cfsp.repair.stages import calibrate_windows, with_sensitivity
from cfsp.result.card import model_card
from cfsp.result.manifest import (
    Stopwatch,
    describe_pruning,
    facts_for_config,
    write_manifest,
)
from cfsp.result.prune_report import PruneReport, prune_report
from cfsp.settings import CalibrationText, Compute, EvaluationText, PruneSettings
from cfsp.text.tokenizers import load_tokenizer
from cfsp.whole_model.load import calibration_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def calibrate_source(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    compute: Compute,
    place: Workplace | None = None,
    team: Team | None = None,
    *,
    sensitivity: bool = False,
) -> Statistics:
    """Draw windows and run them through the model once.

    Args:
        source: the model.
        tokenizer: its own.
        text: what to draw from.
        compute: where and in what.
        place: where to spill and to save; None for a temporary one.
        team: the processes that share the windows; None for this one alone.
        sensitivity: also measure that of every block; in one process only.
    """
    if place is None:
        with temporary_workplace(compute.memory_budget) as temporary:
            return calibrate_source(
                source, tokenizer, text, compute, temporary, team, sensitivity=sensitivity
            )
    engine = compute.engine(source)
    windows = calibration_windows(source, tokenizer, text, compute)
    if team is None or team.size == 1:
        statistics = calibrate_windows(source, windows, engine, text.seed, place)
        asked = Criterion(SENSITIVITY) if sensitivity else Criterion()
        return with_sensitivity(source, statistics, windows, asked, engine)
    return calibrate_together(
        windows,
        lambda part: calibrate_windows(source, part, engine, text.seed, place),
        calibration_record(
            source, windows, device=engine.device, dtype=engine.dtype, seed=text.seed
        ),
        team,
        batch_windows=engine.batch_windows,
        device=engine.device,
    )


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
) -> PruneReport:
    """Prune a checkpoint into a new directory.

    Args:
        source: the model.
        out: where the smaller model goes; must not exist, or be empty.
        settings: how to prune.
        goal: gives the budget; of that in the settings only the multiple then counts.
        statistics: of an earlier calibration of this model.
        plan: an earlier decision for this model; excludes a goal.
        evaluation: texts to measure perplexity on, before and after.
        dry_run: decide without restoration and write only the plan.
        command: what the user typed, for the manifest.

    Raises:
        CfspError: anything that a user can cause; nothing is left behind.
    """
    check_is_outside(out, source.directory)
    remove_finished_work(out)
    check_output_is_free(out)
    if dry_run:
        settings = settings.without_restoration()
    watch = Stopwatch()
    identity = _identity(settings, statistics, plan, goal)
    facts: dict[str, Any] = {}
    with (
        created_parents(out),
        output_workplace(out, identity, settings.compute.memory_budget) as place,
        staged_directory(out) as staging,
    ):
        if goal is not None:
            resolution, statistics = resolve_goal(
                goal,
                source,
                lambda: load_tokenizer(source.directory),
                settings,
                place=place,
                watch=watch,
                statistics=statistics,
            )
            settings = replace(settings, budget=resolution.budget)
            facts = resolution.to_json()
        decision = decide(
            source,
            lambda: calibration_windows(
                source, load_tokenizer(source.directory), settings.text, settings.compute
            ),
            settings,
            place=place,
            watch=watch,
            statistics=statistics,
            plan=plan,
        )
        decision.plan.save(staging / PLAN_FILE)
        if dry_run:
            return prune_report(source, decision, facts, {}, watch, place, None)
        with watch.stage("surgery"):
            digests = _write_checkpoint(source, decision, staging)
        with watch.stage("evaluate"):
            measured = before_and_after(source.directory, staging, evaluation, settings.compute)
            if isinstance(goal, MaxLossIncrease):
                facts["result"] = loss_increase_of(staging, goal, resolution, settings)
        report = prune_report(source, decision, facts, measured, watch, place, out)
        manifest = describe_pruning(decision.plan, report.to_json(), digests, command)
        write_manifest(staging, manifest)
        card = model_card(manifest, decision.plan)
        (staging / "README.md").write_text(card, encoding="utf-8")
    return report


def prune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: PruneSettings,
    goal: Goal | None = None,
) -> PreTrainedModel:
    """Prune a model in memory; the original stays as it is.

    Args:
        model: in evaluation mode.
        tokenizer: its own.
        settings: how to prune.
        goal: gives the budget; of that in the settings only the multiple then counts.

    Returns:
        A new model that shares every unpruned tensor with the original.
    """
    source = LoadedModel(model)
    watch, statistics = Stopwatch(), None
    facts: dict[str, Any] = {}
    with temporary_workplace(settings.compute.memory_budget) as place:
        if goal is not None:
            resolution, statistics = resolve_goal(
                goal, source, lambda: tokenizer, settings, place=place, watch=watch
            )
            settings = replace(settings, budget=resolution.budget)
            facts = resolution.to_json()
        decision = decide(
            source,
            lambda: calibration_windows(source, tokenizer, settings.text, settings.compute),
            settings,
            place=place,
            watch=watch,
            statistics=statistics,
        )
        report = prune_report(source, decision, facts, {}, watch, place, None)
        manifest = describe_pruning(decision.plan, report.to_json(), {}, "cfsp.prune")
        return build_pruned_model(
            model, source, decision.plan, decision.repaired_tensors, facts_for_config(manifest)
        )


def _write_checkpoint(source: Checkpoint, decision: Decision, target: Path) -> dict[str, str]:
    """Write all but manifest and model card; return the digests of weights and code."""
    if decision.statistics is not None:
        decision.statistics.save(target / STATISTICS_FILE)
    weights = write_pruned_weights(source, decision.plan, target, decision.repaired_tensors)
    added = added_specs(source, decision.repaired_tensors)
    widths = decision.plan.kept_widths
    write_config(source.directory, target, source.family, widths, adds_bias=bool(added))
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
        "--restore": settings.restore,
        "local": asdict(settings.local) if settings.restore == "local" else None,
        "--plan": sha256(plan.to_json().encode()).hexdigest() if plan else None,
        **asdict(settings.budget),
        "goal": [type(goal).__name__, asdict(goal)] if goal else None,
        **asdict(settings.criterion),
        "--search": settings.search_rounds or None,
        "--statistics": statistics.record.tokens_digest if statistics else None,
    }

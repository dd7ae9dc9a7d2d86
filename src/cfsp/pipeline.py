"""The whole flow, one line a stage.

    text -> windows -> CALIBRATE -> Statistics -> PLAN -> PruningPlan -> SURGERY -> checkpoint

`prune_checkpoint` goes from directory to directory, `prune_model` from a model in memory to a
smaller one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.allocation import Budget
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.output import check_output_is_free, staged_directory
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource, parameter_count
from cfsp.checkpoint.writing import copy_travelling_files, write_config
from cfsp.errors import UsageError
from cfsp.evaluation import Perplexity, perplexity
from cfsp.in_memory import build_pruned_model
from cfsp.loading import compute_device, compute_dtype, load
from cfsp.manifest import (
    PLAN_FILE,
    STATISTICS_FILE,
    Stopwatch,
    peak_rss_bytes,
    versions,
    write_manifest,
)
from cfsp.model_card import model_card
from cfsp.planning import Criterion, make_plan
from cfsp.progress import item_progress
from cfsp.pruning_plan import PruningPlan
from cfsp.surgery import write_pruned_weights
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import DEFAULT_SEQLEN, Windows, consecutive_windows, draw_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class CalibrationText:
    """Which text to calibrate on; see `cfsp.text.windows.draw_windows`."""

    names: tuple[str, ...] = ("python-docs",)
    samples: int | None = None
    seqlen: int = DEFAULT_SEQLEN
    seed: int = 0

    def draw(self, tokenizer: PreTrainedTokenizerBase) -> Windows:
        """Draw the windows."""
        return draw_windows(
            self.names, tokenizer, samples=self.samples, seqlen=self.seqlen, seed=self.seed
        )


@dataclass(frozen=True)
class EvaluationText:
    """Which texts to measure perplexity on: the first windows of each."""

    names: tuple[str, ...] = ()
    windows: int | None = 12
    seqlen: int = DEFAULT_SEQLEN


@dataclass(frozen=True)
class Compute:
    """Where to compute and in what; `auto` is resolved for the model and machine at hand."""

    device: str = "auto"
    dtype: str = "auto"
    batch_windows: int | None = None


@dataclass(frozen=True)
class PruneReport:
    """What pruning did. Everything but `plan` is also in the manifest.

    Attributes:
        parameters_before: parameters of the source; tied embeddings count once.
        parameters_after: parameters of the result.
        ffn_sparsity: fraction of FFN channels removed.
        model_sparsity: fraction of all parameters removed.
        intermediate_sizes: FFN channels of every block.
        calibration_tokens: tokens that the statistics were gathered over.
        perplexity: text -> {"before", "after", "tokens"}, if it was measured.
        seconds: stage -> seconds.
        peak_rss_bytes: largest resident memory of the process.
        out: the new checkpoint; None after a dry run.
        plan: the decision.
    """

    parameters_before: int
    parameters_after: int
    ffn_sparsity: float
    model_sparsity: float
    intermediate_sizes: list[int]
    calibration_tokens: int
    perplexity: dict[str, dict[str, float]]
    seconds: dict[str, float]
    peak_rss_bytes: int
    out: str | None
    plan: PruningPlan = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the plan, as JSON types."""
        return {k: v for k, v in vars(self).items() if k != "plan"}


def calibrate_source(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    compute: Compute,
) -> Statistics:
    """Draw windows and run them through the model once."""
    return calibrate(
        source,
        text.draw(tokenizer),
        device=compute_device(compute.device),
        dtype=compute_dtype(source, compute.dtype),
        seed=text.seed,
        batch_windows=compute.batch_windows,
    )


def plan_source(
    source: WeightSource, statistics: Statistics, budget: Budget, criterion: Criterion
) -> PruningPlan:
    """Make a plan from statistics, showing progress."""
    with item_progress("plan", source.config.num_hidden_layers, "block") as bar:
        return make_plan(source, statistics, budget, criterion, on_block=bar.update)


def prune_checkpoint(
    source: Checkpoint,
    out: Path,
    *,
    budget: Budget,
    criterion: Criterion,
    text: CalibrationText,
    compute: Compute,
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
        budget: how much to remove; ignored with a plan.
        criterion: what counts as important; ignored with a plan.
        text: what to calibrate on; not read with statistics or a plan.
        compute: where and in what.
        statistics: of an earlier calibration of this model.
        plan: an earlier decision for this model.
        evaluation: texts to measure perplexity on, before and after.
        dry_run: write only the plan, into `out`.
        command: what the user typed, for the manifest.

    Raises:
        CfspError: anything that a user can cause; nothing is left behind.
    """
    check_output_is_free(out)
    if out.resolve().is_relative_to(source.directory.resolve()):
        raise UsageError(f"{out} lies inside the source {source.directory}; choose another output")
    watch = Stopwatch()
    if plan is not None:
        plan.check_fits(source)
    else:
        with watch.stage("calibrate"):
            if statistics is None:
                tokenizer = load_tokenizer(source.directory)
                statistics = calibrate_source(source, tokenizer, text, compute)
        with watch.stage("plan"):
            plan = plan_source(source, statistics, budget, criterion)

    with staged_directory(out) as staging:
        plan.save(staging / PLAN_FILE)
        digests: dict[str, str] = {}
        measured: dict[str, dict[str, float]] = {}
        if not dry_run:
            with watch.stage("surgery"):
                if statistics is not None:
                    statistics.save(staging / STATISTICS_FILE)
                digests = write_pruned_weights(source, plan, staging).digests
                write_config(source.directory, staging, source.family, plan.kept_widths)
                copy_travelling_files(source.directory, staging)
            if evaluation is not None and evaluation.names:
                with watch.stage("evaluate"):
                    measured = _before_and_after(source, staging, evaluation, compute)
        report = _report(source, plan, measured, watch, None if dry_run else out)
        if not dry_run:
            manifest = _manifest(source, plan, report, digests, command)
            write_manifest(staging, manifest)
            (staging / "README.md").write_text(model_card(manifest, plan), encoding="utf-8")
    return report


def prune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    budget: Budget,
    criterion: Criterion,
    text: CalibrationText,
    compute: Compute,
) -> PreTrainedModel:
    """Prune a model in memory; the original stays as it is.

    Returns:
        A new model that shares every unpruned tensor with the original.
    """
    source = LoadedModel(model)
    statistics = calibrate_source(source, tokenizer, text, compute)
    plan = plan_source(source, statistics, budget, criterion)
    return build_pruned_model(model, source, plan)


def evaluate_models(
    names: list[str], texts: EvaluationText, compute: Compute
) -> list[dict[str, Any]]:
    """Measure the perplexity of several models on the same texts.

    Returns:
        For each model: its name, parameters, perplexity by text, and predicted tokens by text.
    """
    return [_evaluate(name, name, texts, compute) for name in names]


def _evaluate(
    path: str | Path, label: str, texts: EvaluationText, compute: Compute
) -> dict[str, Any]:
    device = compute_device(compute.device)
    model = load(path, dtype=compute.dtype, device=device)
    from cfsp.checkpoint.locating import locate_model

    tokenizer = load_tokenizer(locate_model(path))
    results: dict[str, Perplexity] = {}
    for text in texts.names:
        windows = consecutive_windows(text, tokenizer, count=texts.windows, seqlen=texts.seqlen)
        results[text] = perplexity(model, windows, f"{label} on {text}")
    return {
        "model": label,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "perplexity": {text: round(result.value, 4) for text, result in results.items()},
        "tokens": {text: result.tokens for text, result in results.items()},
        "seqlen": texts.seqlen,
    }


def _before_and_after(
    source: Checkpoint, staging: Path, texts: EvaluationText, compute: Compute
) -> dict[str, dict[str, float]]:
    before = _evaluate(source.directory, "dense", texts, compute)
    after = _evaluate(staging, "pruned", texts, compute)
    return {
        text: {
            "before": before["perplexity"][text],
            "after": after["perplexity"][text],
            "tokens": before["tokens"][text],
        }
        for text in texts.names
    }


def _report(
    source: WeightSource,
    plan: PruningPlan,
    measured: dict[str, dict[str, float]],
    watch: Stopwatch,
    out: Path | None,
) -> PruneReport:
    from cfsp.planning import model_size

    before = parameter_count(source)
    after = model_size(source).parameters_with(plan.kept_widths)
    return PruneReport(
        parameters_before=before,
        parameters_after=after,
        ffn_sparsity=round(plan.ffn_sparsity, 6),
        model_sparsity=round(1 - after / before, 6),
        intermediate_sizes=plan.kept_widths,
        calibration_tokens=plan.calibration["windows"] * plan.calibration["seqlen"],
        perplexity=measured,
        seconds=dict(watch.seconds),
        peak_rss_bytes=peak_rss_bytes(),
        out=str(out) if out else None,
        plan=plan,
    )


def _manifest(
    source: Checkpoint,
    plan: PruningPlan,
    report: PruneReport,
    digests: dict[str, str],
    command: str,
) -> dict[str, Any]:
    return {
        "operation": "prune",
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "base_model": asdict(plan.model),
        "criterion": plan.criterion,
        "calibration": plan.calibration,
        "widths_before": [block.width for block in plan.blocks],
        "plan_digest": sha256(plan.to_json().encode()).hexdigest(),
        "files": digests,
        "threads": torch.get_num_threads(),
        **report.to_json(),
    }

"""All that is checked and read before a recovery loads a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.output import check_is_outside, check_output_is_free
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint, fingerprint
from cfsp.checkpoint.skeleton import empty_model
from cfsp.errors import UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.processes import process_count
from cfsp.quality.evaluate import evaluation_windows
from cfsp.recovery.adaptation import BlockTargets, check_installed, misread_name
from cfsp.recovery.data import RecoveryText, read_text
from cfsp.recovery.settings import RecoverSettings, Training
from cfsp.recovery.targets import targets_of
from cfsp.recovery.teacher import open_teacher
from cfsp.streaming.stopwatch import Stopwatch
from cfsp.text.sources import check_texts
from cfsp.text.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Prepared:
    """A recovery before a model is loaded."""

    source: Checkpoint  # the pruned model
    out: Path
    settings: RecoverSettings  # with a number of evaluation windows that every text holds
    watch: Stopwatch
    text: RecoveryText
    targets: list[BlockTargets]
    teacher: Checkpoint | None
    identity: dict[str, Any]  # what the result depends on, as JSON types


def prepare(source: Checkpoint, out: Path, settings: RecoverSettings) -> Prepared:
    """Check all that a user can get wrong, the cheap first, and read the texts."""
    training, method, watch = settings.training, settings.adaptation.method, Stopwatch()
    check_is_outside(out, source.directory)
    check_output_is_free(out)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        # It would write a part of the weights as if it were all.
        raise UsageError(
            "recovery does not run under accelerate's FSDP; start it with torchrun, or accelerate "
            "launch without FSDP, and give --shard if memory is short"
        )
    check_installed(method)
    device = compute_device(settings.compute.device)
    check_texts(settings.data, "calibration")
    check_texts(settings.evaluation.names, "evaluation")
    targets = targets_of(source, settings.adaptation)
    if (plan := source.directory / PLAN_FILE).is_file():
        PruningPlan.load(plan)  # the card needs it: a damaged one is no surprise after training
    if training.shard and any(block.experts for block in targets):
        raise UsageError(
            "--shard cannot shard the adapters of experts; leave it out, or use --targets attention"
        )
    if settings.keep_adapter:
        _check_adapter_can_be_read(source, targets)
    tokenizer = load_tokenizer(source.directory)
    with watch.stage("text"):
        windows = evaluation_windows(settings.evaluation, source)
        teacher = open_teacher(settings.teacher, source, tokenizer, method, device)
        text = read_text(settings.data, tokenizer, seqlen=training.seqlen, bos=training.bos)
    check_tokens(source.config, text.train.token_NT, source.label)
    if windows:
        count = min(len(of_text.tokens_NT) for of_text in windows.values())
        settings = replace(settings, evaluation=replace(settings.evaluation, windows=count))
    identity = {
        "command": "recover",
        "model": fingerprint(source),
        "text": text.train.digest,
        **asdict(settings.adaptation),
        **asdict(training.limit),
        **{name: value for name, value in asdict(training).items() if name != "limit"},
        "teacher": teacher and [teacher.label, asdict(settings.distillation)],
        "eval": {name: of_text.digest for name, of_text in windows.items()},
        "dtype": settings.compute.dtype,
        **_processes(training),
    }
    return Prepared(source, out, settings, watch, text, targets, teacher, identity)


def _check_adapter_can_be_read(source: Checkpoint, targets: Sequence[BlockTargets]) -> None:
    """Refuse to keep an adapter that PEFT would put in the wrong place."""
    names = [name for block in targets for name in block.matrices]
    misread = misread_name(empty_model(source.config), names)
    if misread is not None:
        raise UsageError(
            f"PEFT {version('peft')} cannot read such an adapter of a {source.config.model_type} "
            f"model again: it takes {misread} for a matrix of experts (huggingface/peft issue "
            "3711); leave --keep-adapter out, the recovered model has the adapter merged"
        )


def _processes(training: Training) -> dict[str, int]:
    """Return what must be the same of the processes of a run that goes on.

    Checkpoints of a sharded run are read by any number of them that makes the same steps.
    """
    if training.shard:
        return {
            "windows in a step": training.batch_windows * training.accumulate * process_count(),
            "batch_windows": 0,
            "accumulate": 0,
        }
    return {"processes": process_count()}

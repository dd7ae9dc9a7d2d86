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
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import check_is_outside, check_output_is_free
from cfsp.checkpoint.reading import Checkpoint, fingerprint
from cfsp.checkpoint.skeleton import empty_model
from cfsp.engine.stopwatch import Stopwatch
from cfsp.errors import TextError, UsageError
from cfsp.processes import process_count
from cfsp.quality.evaluate import evaluation_windows
from cfsp.recovery.adaptation import check_installed
from cfsp.recovery.data import RecoveryText, read_text
from cfsp.recovery.expert_adapters import misread_name
from cfsp.recovery.ranks import ranks_of
from cfsp.recovery.settings import Adaptation, TeacherChoice, Training
from cfsp.recovery.targets import BlockTargets, targets_of
from cfsp.recovery.teacher import check_teacher
from cfsp.settings import Compute, EvaluationText, Text
from cfsp.text.sources import check_texts, name_of
from cfsp.text.tokenizers import load_tokenizer


@dataclass(frozen=True)
class Request:
    """The arguments of `recover_checkpoint` with defaults filled in, and when it began."""

    source: Checkpoint
    out: Path
    data: Sequence[str | Text]
    training: Training
    adaptation: Adaptation
    teacher: TeacherChoice | None
    evaluation: EvaluationText | None
    compute: Compute
    keep_adapter: bool
    command: str
    started: float


@dataclass(frozen=True)
class Prepared:
    """What is known before a model is loaded.

    Attributes:
        text: windows to train on and held-out ones.
        rank_L: rank of every block; None for full training.
        targets: what is trained in each block.
        teacher: the dense model.
        evaluation: with a number of windows that every text holds.
        identity: what the result depends on, as JSON types.
    """

    text: RecoveryText
    rank_L: list[int] | None
    targets: list[BlockTargets]
    teacher: Checkpoint | None
    evaluation: EvaluationText | None
    identity: dict[str, Any]


def prepare(request: Request, watch: Stopwatch) -> Prepared:
    """Check all that a user can get wrong, the cheap first, and read the texts.

    Raises:
        CfspError: something is wrong; nothing was written.
    """
    source, evaluation = request.source, request.evaluation
    check_is_outside(request.out, source.directory)
    check_output_is_free(request.out)
    _check_launcher()
    if request.keep_adapter and request.adaptation.method == "full":
        raise UsageError("--keep-adapter needs --method lora: full training has no adapter")
    if not request.data:
        raise TextError("recovery needs text to train on; give --data")
    check_installed(request.adaptation.method)
    compute_device(request.compute.device)
    check_texts(request.data, "calibration")
    if evaluation is not None:
        check_texts(evaluation.names, "evaluation")
    rank_L = ranks_of(source, request.adaptation)
    targets = targets_of(source, request.adaptation)
    if request.training.shard and any(block.experts for block in targets):
        raise UsageError(
            "--shard cannot shard the adapters of experts; leave it out, or use --targets attention"
        )
    if request.keep_adapter:
        _check_adapter_can_be_read(source, targets)
    tokenizer = load_tokenizer(source.directory)
    with watch.stage("text"):
        if evaluation is not None:
            evaluation = _with_windows_counted(evaluation, source)
        teacher = None
        if request.teacher is not None:
            teacher = open_checkpoint(request.teacher.name)
            check_teacher(source, tokenizer, teacher)
        text = read_text(
            request.data, tokenizer, seqlen=request.training.seqlen, bos=request.training.bos
        )
    check_tokens(source.config, text.train.token_NT, source.label)
    return Prepared(text, rank_L, targets, teacher, evaluation, _identity(request, text))


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


def _check_launcher() -> None:
    """Refuse what would write a part of the weights as if it were all."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UsageError(
            "recovery does not run under accelerate's FSDP; start it with torchrun, or accelerate "
            "launch without FSDP, and give --shard if memory is short"
        )


def _with_windows_counted(texts: EvaluationText, source: Checkpoint) -> EvaluationText:
    """Return the texts with a number of windows that each of them holds."""
    read = evaluation_windows(texts, source).values()
    return replace(texts, windows=min(len(windows.tokens_NT) for windows in read))


def _identity(request: Request, text: RecoveryText) -> dict[str, Any]:
    """Return everything that must be the same for a killed run to go on, as JSON types."""
    training, evaluation = asdict(request.training), request.evaluation
    return {
        "command": "recover",
        "model": fingerprint(request.source),
        "text": text.train.digest,
        **asdict(request.adaptation),
        **training.pop("limit"),
        **training,
        "teacher": asdict(request.teacher) if request.teacher else None,
        "eval": [name_of(text) for text in evaluation.names] if evaluation else None,
        "eval_windows": evaluation.windows if evaluation else None,
        "dtype": request.compute.dtype,
        **_processes(request.training),
    }


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

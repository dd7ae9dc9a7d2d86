"""The flow of a recovery, one line a stage.

pruned checkpoint + text -> windows -> ATTACH -> TRAIN -> MERGE -> checkpoint of the same layout
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.output import (
    check_is_outside,
    check_output_is_free,
    created_parents,
    exclusive,
    staged_directory,
)
from cfsp.checkpoint.reading import Checkpoint
from cfsp.engine.stopwatch import Stopwatch
from cfsp.engine.versions import versions
from cfsp.errors import UsageError
from cfsp.processes import is_first_process
from cfsp.quality.evaluate import before_and_after, evaluation_windows
from cfsp.recovery.adaptation import Adaptation, attach, merge
from cfsp.recovery.block_weights import block_weights
from cfsp.recovery.data import RecoveryText, read_text
from cfsp.recovery.recover_report import RecoverReport, print_trainable, recover_report
from cfsp.recovery.run import load_to_train, train
from cfsp.recovery.settings import Training, with_learning_rate
from cfsp.recovery.teacher import TeacherChoice, check_teacher, store_top_tokens
from cfsp.recovery.workspace import Workspace
from cfsp.recovery.writing import copy_everything_else, write_record, write_recovered_weights
from cfsp.settings import Compute
from cfsp.text.sources import check_texts
from cfsp.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.settings import EvaluationText, Text

ADAPTER_DIRECTORY = "adapter"


def recover_checkpoint(
    source: Checkpoint,
    out: Path,
    *,
    data: Sequence[str | Text],
    training: Training,
    adaptation: Adaptation | None = None,
    teacher: TeacherChoice | None = None,
    evaluation: EvaluationText | None = None,
    compute: Compute | None = None,
    resume: bool = False,
    keep_adapter: bool = False,
    command: str = "",
) -> RecoverReport:
    """Train a pruned checkpoint and write the result as a plain checkpoint of the same layout.

    Under torchrun every process calls this with the same arguments; the first one writes.

    Args:
        source: the pruned model.
        out: a new directory.
        data: texts and conversations to train on.
        training: how to train.
        adaptation: what to train; None for LoRA by importance.
        teacher: a dense model to distil from.
        evaluation: texts to measure perplexity on, before and after.
        compute: where to train, and the dtype of the arithmetic and of the weights that are not
            trained.
        resume: continue an interrupted run of the same arguments.
        keep_adapter: also write the adapter, into `out/adapter`.
        command: what the user typed, for the manifest.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    check_texts(data, "calibration")
    if evaluation is not None:
        check_texts(evaluation.names, "evaluation")
    check_is_outside(out, source.directory)
    workspace = Workspace(out)
    if is_first_process():
        workspace.remove_if_finished()
    check_output_is_free(out)
    adaptation = adaptation or Adaptation()
    request = _Request(
        source=source,
        out=out,
        data=data,
        training=with_learning_rate(training, adaptation),
        adaptation=adaptation,
        teacher=teacher,
        evaluation=evaluation,
        compute=compute or Compute(),
        resume=resume,
        keep_adapter=keep_adapter,
        command=command,
    )
    if not is_first_process():
        return _recover(request, workspace)
    with created_parents(out), exclusive(workspace.directory), workspace.kept():
        return _recover(request, workspace)


@dataclass(frozen=True)
class _Request:
    """The arguments of `recover_checkpoint`, with defaults filled in."""

    source: Checkpoint
    out: Path
    data: Sequence[str | Text]
    training: Training
    adaptation: Adaptation
    teacher: TeacherChoice | None
    evaluation: EvaluationText | None
    compute: Compute
    resume: bool
    keep_adapter: bool
    command: str


def _recover(request: _Request, workspace: Workspace) -> RecoverReport:
    started, watch = time.monotonic(), Stopwatch()
    source, training, teacher = request.source, request.training, request.teacher
    weight_L = block_weights(source, request.adaptation)
    _check_launcher()
    if request.keep_adapter and request.adaptation.method == "full":
        raise UsageError("--keep-adapter needs --method lora or dora: full training has no adapter")
    tokenizer = load_tokenizer(source.directory)
    with watch.stage("text"):
        text = read_text(request.data, tokenizer, seqlen=training.seqlen, bos=training.bos)
        measured_on = evaluation_windows(request.evaluation, source)
    check_tokens(source.config, text.train.token_NT, source.label)
    settings = _settings(source, text, training, request.adaptation, teacher)
    if is_first_process():
        workspace.check(settings, resume=request.resume)

    with watch.stage("load"):
        model, dense = _load(source, tokenizer, teacher, request.compute)
    torch.manual_seed(training.seed)
    adapted, blocks = attach(model, source.family, request.adaptation, weight_L)
    names = _trained_tensors(model)
    print_trainable(blocks)

    if is_first_process():
        workspace.open(settings)
    if teacher is not None and teacher.top_k is not None and dense is not None:
        with watch.stage("teacher"):
            text = _with_stored_teacher(text, dense, teacher, workspace)
        dense = None
    with watch.stage("train"):
        outcome = train(
            adapted,
            model,
            text,
            training,
            directory=workspace.directory,
            started=started,
            resume_from=workspace.last_checkpoint() if request.resume else None,
            teacher=dense,
            distillation=teacher.distillation if teacher is not None else None,
        )
    if not is_first_process():
        return recover_report(blocks, outcome, {}, watch, request.out)
    del dense
    with staged_directory(request.out) as staging:
        with watch.stage("write"):
            if request.keep_adapter:
                _save_adapter(adapted, source, staging / ADAPTER_DIRECTORY)
            merged = merge(adapted)
            digests = write_recovered_weights(source, merged, names, staging)
            copy_everything_else(source, staging)
        del adapted, model, merged
        with watch.stage("evaluate"):
            measured = before_and_after(
                source,
                Checkpoint(staging),
                measured_on,
                request.compute,
                labels=("before", "after"),
            )
        report = recover_report(blocks, outcome, measured, watch, request.out)
        write_record(source, staging, _facts(request, text, report), digests)
    workspace.remove()
    return report


def _facts(request: _Request, text: RecoveryText, report: RecoverReport) -> dict[str, Any]:
    """Return what the manifest says of the recovery."""
    return {
        "command": request.command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {**versions(), "accelerate": version("accelerate"), **_peft_version()},
        "adaptation": asdict(request.adaptation),
        "training": asdict(request.training),
        "teacher": _teacher_facts(request.teacher),
        "data": {
            "sources": text.sources,
            "tokens_digest": text.train.digest,
            "bos": text.bos,
        },
        "device": str(compute_device(request.compute.device)),
        "threads": torch.get_num_threads(),
        **asdict(report),
    }


def _check_launcher() -> None:
    """Refuse what would write a part of the weights as if it were all."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise UsageError(
            "recovery does not run under FSDP, which leaves every process a part of the weights; "
            "use DDP (torchrun, or accelerate launch without FSDP), and --method lora with "
            "--gradient-checkpointing if memory is short"
        )


def _load(
    source: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    teacher: TeacherChoice | None,
    compute: Compute,
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Return the model, and the teacher if there is one."""
    device = compute_device(compute.device)
    model = load_to_train(source, device, compute.dtype)
    if teacher is None:
        return model, None
    dense = load_to_train(teacher.name, device, compute.dtype)
    dense_tokenizer = load_tokenizer(Path(dense.config._name_or_path))
    check_teacher(model, tokenizer, dense, dense_tokenizer, teacher.name)
    return model, dense


def _with_stored_teacher(
    text: RecoveryText, dense: PreTrainedModel, teacher: TeacherChoice, workspace: Workspace
) -> RecoveryText:
    assert teacher.top_k is not None
    vocabulary = int(dense.config.vocab_size)
    if not 1 <= teacher.top_k < vocabulary:
        raise UsageError(f"--teacher-top-k must be in [1, {vocabulary}), found {teacher.top_k}")
    train = store_top_tokens(
        dense, text.train, workspace.directory, teacher.top_k, teacher.distillation.temperature
    )
    return replace(text, train=train)


def _trained_tensors(model: PreTrainedModel) -> list[str]:
    """Return the names, in the plain model, of the tensors that training will change."""
    full = [name for name, p in model.named_parameters() if p.requires_grad]
    adapters = [name for name, _ in model.named_modules() if name.endswith(".base_layer")]
    if adapters:
        return [f"{name.removesuffix('.base_layer')}.weight" for name in adapters]
    return full


def _save_adapter(adapted: Any, source: Checkpoint, directory: Path) -> None:
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = str(source.directory)
    adapted.save_pretrained(str(directory))


def _settings(
    source: Checkpoint,
    text: RecoveryText,
    training: Training,
    adaptation: Adaptation,
    teacher: TeacherChoice | None,
) -> dict[str, Any]:
    from cfsp.checkpoint.reading import fingerprint

    return {
        "model": fingerprint(source),
        "text": text.train.digest,
        "training": asdict(training),
        "adaptation": asdict(adaptation),
        "teacher": _teacher_facts(teacher),
    }


def _teacher_facts(teacher: TeacherChoice | None) -> dict[str, Any] | None:
    if teacher is None:
        return None
    return {"name": teacher.name, "top_k": teacher.top_k, **asdict(teacher.distillation)}


def _peft_version() -> dict[str, str]:
    try:
        return {"peft": version("peft")}
    except ModuleNotFoundError:
        return {}

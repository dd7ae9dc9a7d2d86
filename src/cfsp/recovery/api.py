"""Recovery as one call: the command `cfsp recover` with the same names and defaults."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.recovery.recover import recover_checkpoint
from cfsp.recovery.recover_report import RecoverReport
from cfsp.recovery.settings import (
    Adaptation,
    Distillation,
    Limit,
    Method,
    RankAllocation,
    Targets,
    TeacherChoice,
    Training,
)
from cfsp.settings import Bos, Compute, EvaluationText, Text
from cfsp.text.sources import check_texts


def recover(
    model: str | Path,
    *,
    out: str | Path,
    data: Sequence[str | Path | Text],
    method: Method = Adaptation.method,
    rank: float = Adaptation.rank,
    learning_rate: float | None = Training.learning_rate,
    steps: int | None = None,
    epochs: float | None = None,
    max_minutes: float | None = None,
    teacher: str | Path | None = None,
    teacher_weight: float = Distillation.weight,
    eval: Sequence[str | Path | Text] = (),
    eval_windows: int | None = EvaluationText.windows,
    seqlen: int = Training.seqlen,
    batch_windows: int = Training.batch_windows,
    gradient_checkpointing: bool = Training.gradient_checkpointing,
    seed: int = Training.seed,
    bos: Bos = Training.bos,
    keep_adapter: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    targets: Targets = Adaptation.targets,
    rank_allocation: RankAllocation = Adaptation.allocation,
    scale: float = Adaptation.scale,
    temperature: float = Distillation.temperature,
    accumulate: int = Training.accumulate,
    evaluations: int = Training.evaluations,
    warm_up: float = Training.warm_up,
    weight_decay: float = Training.weight_decay,
    revision: str | None = None,
    command: str | None = None,
    started: float | None = None,
) -> RecoverReport:
    """Train a pruned checkpoint into a new directory of the same layout.

    A call that was killed left its work beside `out`; the same call goes on from it.

    Args:
        model: a directory that `prune` wrote; also a hub id or any other model, with
            `rank_allocation="uniform"`.
        out: the new directory.
        data: texts and conversations to train on (see `cfsp.text.sources`).
        method: `lora`, `dora`, or `full` (the projections themselves).
        rank: of the adapters, mean over blocks.
        learning_rate: at its peak; None for what suits the method.
        steps: of the optimizer; give this, epochs or max_minutes.
        epochs: passes over the text.
        max_minutes: of the whole recovery, evaluations and writing included.
        teacher: a dense model to distil from; None trains on the text alone, which wins in the
            same time.
        teacher_weight: of the teacher against the text, in [0, 1].
        eval: texts to measure perplexity on, before and after.
        eval_windows: of each of them, None for all; fewer where `max_minutes` is too short.
        seqlen: tokens in a window to train on.
        batch_windows: windows that pass together, on each process.
        gradient_checkpointing: less memory, more time.
        seed: of the order of windows and of the adapters' start.
        bos: whether windows begin with BOS: `auto` (as the tokenizer begins an input), `yes`, `no`.
        keep_adapter: also write the PEFT adapter, into `out/adapter`.
        device: where to train; `auto` is an accelerator if there is one.
        dtype: of the arithmetic; `auto` is the model's own, and float32 where bfloat16 is emulated.
        targets: projections to train: `mlp`, `attention` or `all`.
        rank_allocation: ranks follow the blocks' `importance`, are `uniform`, or its `inverse`.
        scale: alpha / r of the adapters.
        temperature: of the distillation.
        accumulate: batches in a step.
        evaluations: on held-out windows in the run, at most.
        warm_up: part of the run in which the learning rate rises.
        weight_decay: of AdamW.
        revision: branch, tag or commit of a hub id.
        command: what the manifest gives as the command; None for this call.
        started: when `max_minutes` began, in seconds of `time.monotonic()`; None for now.

    Returns:
        What training did and what it brought.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    started = time.monotonic() if started is None else started
    texts = tuple(map(_text, data))
    evaluation = EvaluationText(tuple(map(_text, eval)), eval_windows, bos=bos)
    adaptation = Adaptation(method, targets, rank, scale, rank_allocation)
    training = Training(
        Limit(steps, epochs, max_minutes),
        learning_rate=learning_rate,
        batch_windows=batch_windows,
        accumulate=accumulate,
        seqlen=seqlen,
        warm_up=warm_up,
        weight_decay=weight_decay,
        evaluations=evaluations,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        bos=bos,
    )
    distillation = Distillation(teacher_weight, temperature)
    # Before the model: it may have to be downloaded or converted.
    check_texts(texts, "calibration")
    check_texts(evaluation.names, "evaluation")
    return recover_checkpoint(
        open_checkpoint(model, revision),
        Path(out),
        data=texts,
        training=training,
        adaptation=adaptation,
        teacher=None if teacher is None else TeacherChoice(str(teacher), distillation),
        evaluation=evaluation,
        compute=Compute(device, dtype),
        keep_adapter=keep_adapter,
        started=started,
        command=f"cfsp.recover({str(model)!r}, ...)" if command is None else command,
    )


def _text(given: str | Path | Text) -> str | Text:
    return str(given) if isinstance(given, Path) else given

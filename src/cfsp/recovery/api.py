"""Recovery as one call: the command `cfsp recover` with the same names and defaults."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.processes import take_own_accelerator
from cfsp.recovery.recover import recover_checkpoint
from cfsp.recovery.recover_report import RecoverReport
from cfsp.recovery.settings import (
    AUTO_TEACHER,
    Adaptation,
    Distillation,
    Limit,
    Method,
    RecoverSettings,
    Training,
)
from cfsp.settings import (
    DEFAULT_TEXT,
    Compute,
    Data,
    EvaluationText,
    check_names,
    from_names,
    texts_of,
)
from cfsp.text.sources import check_texts

SETTINGS = (Adaptation, Training, Distillation, EvaluationText, Compute)


def recover(
    model: str | Path,
    *,
    out: str | Path,
    data: Data = DEFAULT_TEXT,
    max_minutes: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    method: Method = "lora",
    learning_rate: float | None = None,
    teacher: str | Path | None = AUTO_TEACHER,
    eval: Data = (),
    seqlen: int = Training.seqlen,
    keep_adapter: bool = False,
    device: str = "auto",
    command: str | None = None,
    started: float | None = None,
    **advanced: Any,
) -> RecoverReport:
    """Train a pruned checkpoint into a new directory of the same layout.

    A call that was killed left its work beside `out`; the same call goes on from it.

    Args:
        model: a directory that `prune` wrote; also a hub id or any other model.
        out: the new directory.
        data: texts and conversations to train on (see `cfsp.text.sources`).
        max_minutes: of the whole recovery, evaluations and writing included; give this, steps or
            epochs.
        steps: of the optimizer.
        epochs: passes over the text.
        method: `lora`, or `full` (the projections themselves).
        learning_rate: at its peak; None for what suits the method and the size of the weights.
        teacher: a dense model to distil from; `auto` is the one that was pruned, if it is still
            where its manifest says and there is memory for both; None trains on the text alone.
        eval: texts to measure perplexity on, before and after.
        seqlen: tokens in a window to train on.
        keep_adapter: also write the PEFT adapter, into `out/adapter`.
        device: where to train; `auto` is an accelerator if there is one.
        command: what the manifest gives as the command; None for this call.
        started: when `max_minutes` began, in seconds of `time.monotonic()`; None for now.
        **advanced: what else `cfsp recover --help` and `--help-all` list, by the same names.

    Returns:
        What training did and what it brought.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    started = time.monotonic() if started is None else started
    take_own_accelerator(device)
    check_names(recover, advanced, *SETTINGS)
    others = {name: value for name, value in advanced.items() if name != "batch_windows"}
    how = {"learning_rate": learning_rate, "seqlen": seqlen, **advanced}
    settings = RecoverSettings(
        data=texts_of(data),
        training=from_names(Training, how, limit=Limit(max_minutes, steps, epochs)),
        adaptation=from_names(Adaptation, advanced, method=method),
        teacher=None if teacher is None else str(teacher),
        distillation=from_names(Distillation, advanced),
        evaluation=from_names(EvaluationText, advanced, names=texts_of(eval)),
        compute=from_names(Compute, others, device=device),
        keep_adapter=keep_adapter,
    )
    # Before the model: it may have to be downloaded or converted.
    check_texts(settings.data, "calibration")
    check_texts(settings.evaluation.names, "evaluation")
    return recover_checkpoint(
        open_checkpoint(model),
        Path(out),
        settings,
        command=f"cfsp.recover({str(model)!r}, ...)" if command is None else command,
        started=started,
    )

"""Recovery: training wins back quality, in the same layout.

pruned checkpoint + text -> windows -> ATTACH -> TRAIN -> MERGE -> checkpoint of the same layout
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import check_output_is_free, created_parents, staged_directory
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import RecoveryError, UsageError
from cfsp.processes import is_first_process, joined, take_own_accelerator
from cfsp.quality.perplexity import before_and_after
from cfsp.recovery.adaptation import (
    attach,
    merge,
    size_of_weights,
    trainable_in_blocks,
    trained_parameters,
)
from cfsp.recovery.loss import loss_inside
from cfsp.recovery.prepare import (
    Perplexities,
    Prepared,
    measure,
    prepare,
)
from cfsp.recovery.schedule import MARGIN
from cfsp.recovery.settings import (
    AUTO_TEACHER,
    Adaptation,
    Distillation,
    Limit,
    Method,
    RecoverSettings,
    Training,
)
from cfsp.recovery.sharding import shard, trained_tensors
from cfsp.recovery.training import (
    BYTES_PER_SECOND,
    TrainingOutcome,
    load_to_train,
    schedule_of,
    train,
)
from cfsp.recovery.writing import copy_everything_else, write_record, write_recovered_weights
from cfsp.settings import (
    DEFAULT_TEXT,
    Compute,
    Data,
    EvaluationText,
    check_names,
    from_names,
    texts_of,
)
from cfsp.streaming.memory import peak_rss_bytes
from cfsp.streaming.pass_state import PassState
from cfsp.streaming.work_dir import (
    WorkDir,
    directory_of_process,
    load_or_compute,
    output_work_dir,
    remove_finished_work,
)
from cfsp.text.sources import check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Of the minutes, for measuring before and after together; training is what they are for.
_SHARE_TO_MEASURE = 0.5
# Names of places in the work directory.
_TRAIN, _BEFORE = "train", "before"


@dataclass(frozen=True)
class RecoverReport(TrainingOutcome):
    """What recovery did. Everything is also in the manifest.

    Attributes:
        trainable_parameters: in all.
        blocks: rank and trainable parameters of each block.
        perplexity: text -> {"before", "after", "tokens", "windows", "seqlen", "bos"}, if
            it was measured.
        seconds: stage -> seconds.
        peak_rss_bytes: largest resident memory of the process.
        out: the new checkpoint.
    """

    trainable_parameters: int
    blocks: list[dict[str, int | None]]
    perplexity: Perplexities
    seconds: dict[str, float]
    peak_rss_bytes: int
    out: str


def recover(
    model: str | Path,
    *,
    out: str | Path,
    data: Data = DEFAULT_TEXT,
    max_minutes: float | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    method: Method = "auto",
    learning_rate: float | None = None,
    teacher: str | Path | None = AUTO_TEACHER,
    eval: Data = (),
    seqlen: int = Training.seqlen,
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
        method: `lora`, or `full` (the projections themselves); `auto` is full where one process has
            the memory.
        learning_rate: at its peak; None for what suits the method and the size of the weights.
        teacher: a dense model to distil from; `auto` is the one that was pruned, if it is still
            where its manifest says and there is memory for both; None trains on the text alone.
        eval: texts to measure perplexity on, before and after.
        seqlen: tokens in a window to train on.
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
    check_names(recover, advanced, Adaptation, Training, Distillation, EvaluationText, Compute)
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
    )
    # Before the model: it may have to be downloaded or converted.
    check_texts(settings.data, settings.evaluation.names)
    return recover_checkpoint(
        open_checkpoint(model),
        Path(out),
        settings,
        command=f"cfsp.recover({str(model)!r}, ...)" if command is None else command,
        started=started,
    )


def recover_checkpoint(
    source: Checkpoint,
    out: Path,
    settings: RecoverSettings,
    *,
    command: str = "",
    started: float | None = None,
) -> RecoverReport:
    """Train a pruned checkpoint and write the result as a plain checkpoint of the same layout.

    A run that was killed left its work beside `out`; the same call goes on from it. Under torchrun
    every process calls this with the same arguments; the first one writes. `started` is as for
    `recover`.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    started = time.monotonic() if started is None else started
    if is_first_process():
        remove_finished_work(out)
    ready = prepare(source, out, settings)
    if not is_first_process():
        return _recover(ready, None, started, command)
    with created_parents(out), output_work_dir(out, ready.identity) as work_dir:
        check_output_is_free(out)  # another run may have been at work meanwhile
        report = _recover(ready, work_dir, started, command)
    limit = settings.training.limit.seconds
    if limit is not None and (took := time.monotonic() - started) > limit:
        logger.warning(
            f"recovery took {took / 60:.1f} minutes, more than --max-minutes {limit / 60:g}; it "
            f"made {report.steps} training steps: give it more, or smaller --batch-windows"
        )
    return report


def _recover(
    ready: Prepared, work_dir: WorkDir | None, started: float, command: str
) -> RecoverReport:
    """Do the work; only the first process has a work directory, and writes."""
    settings, watch = ready.settings, ready.watch
    before: Perplexities = {}
    seconds_to_measure = 0.0
    if work_dir is not None and settings.evaluation.names:
        with watch.stage("evaluate"):
            before, seconds_to_measure = _measured_before(ready, work_dir)
    adapted, blocks, training, outcome = _train(ready, work_dir, started, seconds_to_measure)
    if not outcome.best_step:
        raise _nothing_gained(outcome, ready.source)

    def report(perplexity: Perplexities) -> RecoverReport:
        return RecoverReport(
            **asdict(outcome),
            trainable_parameters=sum(block["parameters"] or 0 for block in blocks),
            blocks=blocks,
            perplexity=perplexity,
            seconds=dict(watch.seconds),
            peak_rss_bytes=peak_rss_bytes(),
            out=str(ready.out),
        )

    if work_dir is None:
        return report({})
    with staged_directory(ready.out) as staging:
        with watch.stage("write"):
            merged = merge(adapted)
            names = trained_parameters(merged, ready.targets)
            digests = write_recovered_weights(ready.source, merged, names, staging)
            copy_everything_else(ready.source, staging)
        del adapted, merged
        perplexity: Perplexities = {}
        if before:
            with watch.stage("evaluate"):
                after = measure(staging, settings.evaluation, settings.compute)
                perplexity = before_and_after(before, after)
        done = report(perplexity)
        ready = replace(ready, settings=replace(settings, training=training))
        write_record(ready, done, staging, digests, command)
    return done


def _measured_before(ready: Prepared, work_dir: WorkDir) -> tuple[Perplexities, float]:
    """Return the perplexity before training and the seconds that it took, for a killed run too."""

    def timed() -> dict[str, Any]:
        begin = time.monotonic()
        found = measure(ready.source.directory, ready.settings.evaluation, ready.settings.compute)
        return {"perplexity": found, "seconds": time.monotonic() - begin}

    before = load_or_compute(work_dir, _BEFORE, timed)
    limit, needed = ready.settings.training.limit, 2 * before["seconds"]
    if limit.seconds is not None and needed > _SHARE_TO_MEASURE * limit.seconds:
        raise UsageError(
            f"--eval takes {needed:.0f} s, before and after training, more than half of "
            f"--max-minutes {limit.minutes:g}; give --max-minutes "
            f"{math.ceil(needed / _SHARE_TO_MEASURE / 60)} or more, --set windows=N, or no --eval"
        )
    return before["perplexity"], before["seconds"]


def _train(
    ready: Prepared, work_dir: WorkDir | None, started: float, seconds_to_measure: float
) -> tuple[nn.Module, list[dict[str, int | None]], Training, TrainingOutcome]:
    """Train; return the model, what is trainable in each block, the settings with their rate."""
    source, settings, watch = ready.source, ready.settings, ready.watch
    device = compute_device(settings.compute.device)
    sharded, nbytes = settings.training.shard, sum(s.nbytes for s in source.specs.values())

    def load(which: Checkpoint) -> PreTrainedModel:
        with watch.stage("load"):
            return load_to_train(which, device, settings.compute.dtype, stays_on_cpu=sharded)

    model = load(source)
    dense = None if ready.teacher is None else load(ready.teacher)
    names = trained_parameters(model, ready.targets)
    training = settings.training.with_rate_for(
        settings.adaptation.method, size_of_weights(model, names)
    )
    torch.manual_seed(training.seed)
    adapted = attach(model, source.architecture, ready.targets)
    blocks = trainable_in_blocks(model, source.architecture, ready.targets)
    _tell_what_is_trained(blocks, training)

    # What merging, writing and loading again may take, by what loading took.
    later = watch.seconds["load"] + nbytes / BYTES_PER_SECOND + seconds_to_measure
    schedule = schedule_of(
        adapted,
        ready.text,
        training,
        has_teacher=dense is not None,
        started=started,
        after_training=MARGIN * later,
    )
    directory = directory_of_process(ready.out) / _TRAIN
    with (
        watch.stage("train"),
        joined(device) if sharded else nullcontext(),
        loss_inside(model, dense, settings.distillation.weight) as loss,
    ):
        if sharded:
            shard(adapted, model, source.architecture, device)
            if ready.teacher is not None and dense is not None:
                shard(dense, dense, ready.teacher.architecture, device)
        outcome = train(
            adapted,
            ready.text,
            training,
            schedule=schedule,
            loss=loss,
            directory=directory,
            callbacks=[_Saver(PassState(directory, ready.identity))] if work_dir else [],
        )
        tensors = trained_tensors(adapted) if sharded else {}
    if tensors:
        # The parts of this process are not all: what was trained goes into the model as it was.
        del adapted, model
        adapted = attach(load(source), source.architecture, ready.targets)
        adapted.load_state_dict(tensors, strict=False)
    return adapted, blocks, training, outcome


class _Saver(TrainerCallback):  # type: ignore[misc]
    """Notes in the work directory that a checkpoint is complete, to go on from."""

    def __init__(self, state: PassState) -> None:
        self._state = state

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._state.commit(state.global_step, None)


def _nothing_gained(outcome: TrainingOutcome, source: Checkpoint) -> RecoveryError:
    before, *after = (entry["held_out"] for entry in outcome.history)
    return RecoveryError(
        f"training did not make the loss on held-out text lower ({before:.4f} before, "
        f"{min(after):.4f} at best in {counted(outcome.steps, 'steps')}), so nothing is written, "
        f"and {source.label} is the best there is; give it more steps or minutes, other text, or "
        "another --learning-rate"
    )


def _tell_what_is_trained(blocks: Sequence[dict[str, int | None]], training: Training) -> None:
    """Say how many parameters are trained, and how fast; the report has those of each block."""
    if not is_first_process():
        return
    ranks = [block["rank"] or 0 for block in blocks]
    low, high = min(ranks), max(ranks)
    of_rank = f" of rank {low}" + f" to {high}" * (low != high) if high else ""
    logger.info(
        f"training {sum(block['parameters'] or 0 for block in blocks):,d} parameters{of_rank} in "
        f"{len(blocks)} blocks, learning rate {training.learning_rate:g}"
    )

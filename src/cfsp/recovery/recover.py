"""Recovery: training wins back quality, in the same layout.

pruned checkpoint + text -> windows -> ATTACH -> TRAIN -> MERGE -> checkpoint of the same layout
"""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import check_output_is_free, created_parents, staged_directory
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import RecoveryError
from cfsp.processes import is_first_process, joined, take_own_accelerator
from cfsp.quality.evaluate import perplexities
from cfsp.quality.perplexity import before_and_after
from cfsp.recovery.adaptation import (
    attach,
    load_to_train,
    merge,
    size_of_weights,
)
from cfsp.recovery.loss import loss_inside
from cfsp.recovery.prepare import Prepared, prepare
from cfsp.recovery.schedule import MARGIN, Schedule
from cfsp.recovery.settings import (
    AUTO_TEACHER,
    RELATIVE_RATES,
    Adaptation,
    Limit,
    Method,
    RecoverSettings,
    Training,
)
from cfsp.recovery.trainer import TrainingOutcome, shard, train, trained_tensors
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
from cfsp.streaming.work_dir import (
    PassState,
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
# A slow disk writes so much; better is measured as soon as something is written.
BYTES_PER_SECOND = 200e6
# Names of places in the work directory.
_TRAIN, _BEFORE = "train", "before"


@dataclass(frozen=True)
class RecoverReport(TrainingOutcome):
    """What recovery did. Everything is also in the manifest."""

    trainable_parameters: int  # in all
    ranks: list[int | None]  # of the adapters in each block; None in full training
    # Text -> {"before", "after", "tokens", "windows", "seqlen", "bos"}, if it was measured.
    perplexity: dict[str, dict[str, Any]]
    seconds: dict[str, float]  # by stage
    peak_rss_bytes: int  # of the process
    out: str  # the new checkpoint


def recover(
    model: str | Path,
    *,
    out: str | Path,
    data: Data = DEFAULT_TEXT,
    max_minutes: float | None = None,
    steps: int | None = None,
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
        max_minutes: of the whole recovery, evaluations and writing included; without this and
            without steps it is one pass over the text.
        steps: of the optimizer.
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
    check_names(recover, advanced, Adaptation, Training, EvaluationText, Compute)
    others = {name: value for name, value in advanced.items() if name != "batch_windows"}
    how = {"learning_rate": learning_rate, "seqlen": seqlen, **advanced}
    settings = RecoverSettings(
        data=texts_of(data),
        training=from_names(Training, how, limit=Limit(max_minutes, steps)),
        adaptation=from_names(Adaptation, advanced, method=method),
        teacher=None if teacher is None else str(teacher),
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

    Under torchrun every process calls this with the same arguments; the first one writes.
    `started` is as for `recover`.
    """
    started = time.monotonic() if started is None else started
    if is_first_process():
        remove_finished_work(out)
    ready = prepare(source, out, settings)
    if not is_first_process():
        return _recover(ready, None, started, command)
    with (
        created_parents(out),
        output_work_dir(out, ready.identity, settings.compute.memory_budget) as work_dir,
    ):
        check_output_is_free(out)  # another run may have been at work meanwhile
        report = _recover(ready, work_dir, started, command)
    limit, took = settings.training.limit.minutes, (time.monotonic() - started) / 60
    if limit is not None and took > limit:
        logger.warning(
            f"recovery took {took:.1f} minutes, more than --max-minutes {limit:g}; it "
            f"made {report.steps} training steps: give it more, or smaller --batch-windows"
        )
    return report


def _recover(
    ready: Prepared, work_dir: WorkDir | None, started: float, command: str
) -> RecoverReport:
    """Do the work; only the first process has a work directory, and writes."""
    settings, watch = ready.settings, ready.watch
    before: dict[str, Any] = {"seconds": 0.0}
    if work_dir is not None and ready.windows:
        with watch.stage("evaluate"):
            measure = partial(_measured_before, ready, work_dir)
            before = load_or_compute(work_dir, _BEFORE, measure)
    adapted, trainable, training, outcome = _train(ready, started, before["seconds"])
    if not outcome.best_step:
        raise _nothing_gained(outcome, ready.source)

    def report(perplexity: dict[str, dict[str, Any]]) -> RecoverReport:
        return RecoverReport(
            **asdict(outcome),
            trainable_parameters=trainable,
            ranks=[block.rank for block in ready.targets],
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
            names = [name for block in ready.targets for name in block.parameters]
            digests = write_recovered_weights(ready.source, merged, names, staging)
            copy_everything_else(ready.source, staging)
        del adapted, merged
        perplexity: dict[str, dict[str, Any]] = {}
        if ready.windows:
            with watch.stage("evaluate"):
                found, compute = Checkpoint(staging, "the recovered model"), settings.compute
                after = perplexities(found, ready.windows, compute, work_dir, "recovered")
                perplexity = before_and_after(before["perplexity"], after)
        done = report(perplexity)
        ready = replace(ready, settings=replace(settings, training=training))
        write_record(ready, done, staging, digests, command)
    return done


def _measured_before(ready: Prepared, work_dir: WorkDir) -> dict[str, Any]:
    """Return the `perplexity` before training and the `seconds` that it took: it takes them again.

    They are no time to train in.
    """
    begin, compute = time.monotonic(), ready.settings.compute
    found = perplexities(ready.source, ready.windows, compute, work_dir, "pruned")
    return {"perplexity": found, "seconds": time.monotonic() - begin}


def _train(
    ready: Prepared, started: float, seconds_to_measure: float
) -> tuple[nn.Module, int, Training, TrainingOutcome]:
    """Train; return the model, how many parameters are trained, the settings with their rate."""
    source, settings, watch = ready.source, ready.settings, ready.watch
    device = compute_device(settings.compute.device)
    sharded, nbytes = settings.training.shard, sum(s.nbytes for s in source.specs.values())

    def load(which: Checkpoint) -> PreTrainedModel:
        with watch.stage("load"):
            return load_to_train(which, device, settings.compute.dtype, stays_on_cpu=sharded)

    model = load(source)
    dense = None if ready.teacher is None else load(ready.teacher)
    names = [name for block in ready.targets for name in block.parameters]
    usual = RELATIVE_RATES[settings.adaptation.method] * size_of_weights(model, names)
    rate = settings.training.learning_rate or float(f"{usual:.3g}")
    training = replace(settings.training, learning_rate=rate)
    torch.manual_seed(training.seed)
    adapted = attach(model, source.architecture, ready.targets)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    if is_first_process():
        ranks = sorted({block.rank for block in ready.targets if block.rank is not None})
        of_rank = (
            f" of rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}"
            if ranks
            else ""
        )
        logger.info(f"training {trainable:,d} parameters{of_rank} in {len(ready.targets)} blocks")

    # What merging, writing and loading again may take, by what loading took.
    later = watch.seconds["load"] + nbytes / BYTES_PER_SECOND + seconds_to_measure
    schedule = _schedule(ready, training, adapted, started, MARGIN * later)
    work = PassState(directory_of_process(ready.out) / _TRAIN, ready.identity)
    with (
        watch.stage("train"),
        joined(device) if sharded else nullcontext(),
        loss_inside(model, dense, training.teacher_weight) as loss,
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
            work=work,
        )
        training = replace(training, learning_rate=schedule.rate_scale * rate)
        tensors = trained_tensors(adapted) if sharded else {}
    if tensors:
        # The parts of this process are not all: what was trained goes into the model as it was.
        del adapted, model
        adapted = attach(load(source), source.architecture, ready.targets)
        adapted.load_state_dict(tensors, strict=False)
    return adapted, trainable, training, outcome


def _schedule(
    ready: Prepared, training: Training, adapted: nn.Module, started: float, after_training: float
) -> Schedule:
    """Return when to evaluate and to stop; of the minutes some seconds are needed afterwards."""
    text, limit, has_teacher = ready.text, training.limit, ready.teacher is not None
    # Backward through frozen weights takes as long as forward, and once more for the gradients of
    # all weights.
    trains_all = ready.settings.adaptation.method == "full"
    forwards = 2.5 + 0.5 * trains_all + has_teacher + training.gradient_checkpointing
    trained_bytes = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    return Schedule(
        limit.in_steps(len(text.train), training.windows_in_step),
        training.evaluations,
        started,
        seconds=None if limit.minutes is None else 60 * limit.minutes,
        # Then the best weights are read again.
        after_training=after_training + trained_bytes / BYTES_PER_SECOND,
        evaluation_steps=len(text.held_out)
        / training.windows_in_step
        * (1 + has_teacher)
        / forwards,
        # The weights and AdamW's two moments.
        save_seconds=3 * trained_bytes / BYTES_PER_SECOND,
        follows_loss=trains_all and ready.settings.training.learning_rate is None,
    )


def _nothing_gained(outcome: TrainingOutcome, source: Checkpoint) -> RecoveryError:
    before, *after = (entry["held_out"] for entry in outcome.history)
    return RecoveryError(
        f"training did not make the loss on held-out text lower ({before:.4f} before, "
        f"{min(after):.4f} at best in {counted(outcome.steps, 'steps')}), so nothing is written, "
        f"and {source.label} is the best there is; give it more steps or minutes, other text, or "
        "another --learning-rate"
    )

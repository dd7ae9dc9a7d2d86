"""The flow of a recovery, one line a stage.

pruned checkpoint + text -> windows -> ATTACH -> TRAIN -> MERGE -> checkpoint of the same layout
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.output import check_output_is_free, created_parents, staged_directory
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import RecoveryError
from cfsp.processes import is_first_process, joined
from cfsp.recovery.adaptation import (
    attach,
    merge,
    save_adapter,
    size_of_weights,
    trainable_in_blocks,
    trained_parameters,
)
from cfsp.recovery.evaluation import (
    Baseline,
    Perplexities,
    before_and_after,
    measure,
    measure_before,
)
from cfsp.recovery.loss import loss_inside
from cfsp.recovery.prepare import Prepared, prepare
from cfsp.recovery.recover_report import RecoverReport, TrainingOutcome
from cfsp.recovery.schedule import MARGIN
from cfsp.recovery.settings import RecoverSettings, Training
from cfsp.recovery.sharding import shard, trained_tensors
from cfsp.recovery.training import BYTES_PER_SECOND, load_to_train, schedule_of, train
from cfsp.recovery.writing import copy_everything_else, write_record, write_recovered_weights
from cfsp.streaming.memory import peak_rss_bytes
from cfsp.streaming.pass_state import PassState
from cfsp.streaming.work_dir import (
    WorkDir,
    directory_of_process,
    load_or_compute,
    output_work_dir,
    remove_finished_work,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
ADAPTER_DIRECTORY = "adapter"
# Seconds that processes wait for each other, as the Trainer lets them.
_PATIENCE = 1800.0
# Names of places in the work directory.
_TRAIN, _BEFORE = "train", "before"


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
    every process calls this with the same arguments; the first one writes.

    Args:
        source: the pruned model.
        out: a new directory.
        settings: how.
        command: what the user typed, for the manifest.
        started: when the minutes of the limit began, in seconds of `time.monotonic()`; None for
            now.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    started = time.monotonic() if started is None else started
    if is_first_process():
        remove_finished_work(out)
    ready = prepare(source, out, settings)
    if not is_first_process():
        return _recover(ready, None, started, command)
    with created_parents(out), output_work_dir(out, ready.identity) as place:
        check_output_is_free(out)  # another run may have been at work meanwhile
        report = _recover(ready, place, started, command)
    limit = settings.training.limit.seconds
    if limit is not None and (took := time.monotonic() - started) > limit:
        logger.warning(
            f"recovery took {took / 60:.1f} minutes, more than --max-minutes {limit / 60:g}; it "
            f"made {report.steps} training steps: give it more, or smaller --batch-windows"
        )
    return report


def _recover(ready: Prepared, place: WorkDir | None, started: float, command: str) -> RecoverReport:
    """Do the work; only the first process has a place, and writes."""
    settings, watch = ready.settings, ready.watch
    before = Baseline({}, 0, 0.0)
    if place is not None and settings.evaluation.names:
        with watch.stage("evaluate"):
            before = _measured_before(ready, place)
    adapted, blocks, training, outcome = _train(ready, place, started, before.seconds)
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

    if place is None:
        return report({})
    with staged_directory(ready.out) as staging:
        with watch.stage("write"):
            if settings.keep_adapter:
                save_adapter(adapted, ready.source, staging / ADAPTER_DIRECTORY)
            merged = merge(adapted)
            names = trained_parameters(merged, ready.targets)
            digests = write_recovered_weights(ready.source, merged, names, staging)
            copy_everything_else(ready.source, staging)
        del adapted, merged
        perplexity: Perplexities = {}
        if before.windows:
            with watch.stage("evaluate"):
                after = measure(staging, settings.evaluation, settings.compute, before.windows)
                perplexity = before_and_after(before.perplexity, after)
        done = report(perplexity)
        ready = replace(ready, settings=replace(settings, training=training))
        write_record(ready, done, staging, digests, command)
    return done


def _measured_before(ready: Prepared, place: WorkDir) -> Baseline:
    """Return the perplexity before training, which a killed run may have measured already."""
    settings = ready.settings
    windows = settings.evaluation.windows
    assert windows is not None

    def measure_windows(count: int) -> Perplexities:
        return measure(ready.source.directory, settings.evaluation, settings.compute, count)

    seconds = settings.training.limit.seconds
    return Baseline(
        **load_or_compute(
            place, _BEFORE, lambda: asdict(measure_before(measure_windows, windows, seconds))
        )
    )


def _train(
    ready: Prepared, place: WorkDir | None, started: float, seconds_to_measure: float
) -> tuple[nn.Module, list[dict[str, int | None]], Training, TrainingOutcome]:
    """Train; return the model, what is trainable in each block, the settings with their rate."""
    source, settings, watch = ready.source, ready.settings, ready.watch
    device, adaptation = compute_device(settings.compute.device), settings.adaptation
    sharded, nbytes = settings.training.shard, sum(s.nbytes for s in source.specs.values())

    def load(which: Checkpoint) -> PreTrainedModel:
        with watch.stage("load"):
            return load_to_train(which, device, settings.compute.dtype, stays_on_cpu=sharded)

    def attached(model: PreTrainedModel) -> nn.Module:
        return attach(model, source.architecture, ready.targets, adaptation.scale)

    model = load(source)
    dense = None if ready.teacher is None else load(ready.teacher)
    names = trained_parameters(model, ready.targets)
    training = settings.training.with_rate_for(adaptation.method, size_of_weights(model, names))
    torch.manual_seed(training.seed)
    adapted = attached(model)
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
        joined(device, _PATIENCE) if sharded else nullcontext(),
        loss_inside(model, dense, settings.distillation) as loss,
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
            callbacks=[_Saver(PassState(directory, ready.identity))] if place else [],
        )
        tensors = trained_tensors(adapted, keeps=place is not None) if sharded else {}
    if tensors:
        # The parts of this process are not all: what was trained goes into the model as it was.
        del adapted, model
        adapted = attached(load(source))
        adapted.load_state_dict(tensors, strict=False)
    return adapted, blocks, training, outcome


class _Saver(TrainerCallback):  # type: ignore[misc]
    """Notes in the work place that a checkpoint is complete, to go on from."""

    def __init__(self, state: PassState) -> None:
        self._state = state

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._state.commit(state.global_step, None)


def _nothing_gained(outcome: TrainingOutcome, source: Checkpoint) -> RecoveryError:
    before, *after = (entry["perplexity"] for entry in outcome.history)
    return RecoveryError(
        f"training did not make the held-out perplexity lower ({before:.2f} before, "
        f"{min(after):.2f} at best in {counted(outcome.steps, 'steps')}), so nothing is written, "
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

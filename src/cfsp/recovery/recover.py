"""The flow of a recovery, one line a stage.

pruned checkpoint + text -> windows -> ATTACH -> TRAIN -> MERGE -> checkpoint of the same layout
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.loading import compute_device
from cfsp.checkpoint.output import check_output_is_free, created_parents, staged_directory
from cfsp.checkpoint.reading import Checkpoint
from cfsp.engine.pass_state import STATE_FILE, PassState
from cfsp.engine.stopwatch import Stopwatch
from cfsp.engine.workplace import (
    Workplace,
    directory_of_process,
    output_workplace,
    remove_finished_work,
)
from cfsp.errors import RecoveryError
from cfsp.processes import is_first_process, joined
from cfsp.recovery.adaptation import (
    TrainableBlock,
    attach,
    merge,
    save_adapter,
    size_of_weights,
    trained_parameters,
)
from cfsp.recovery.evaluation import Baseline, baseline_of, before_and_after
from cfsp.recovery.prepare import Prepared, Request, prepare
from cfsp.recovery.recover_report import RecoverReport, recover_report
from cfsp.recovery.saved import SaveState, last_checkpoint
from cfsp.recovery.settings import Adaptation, TeacherChoice, Training
from cfsp.recovery.sharding import shard, trained_tensors
from cfsp.recovery.training import BYTES_PER_SECOND, TrainingOutcome, load_to_train, train
from cfsp.recovery.writing import (
    copy_everything_else,
    recovery_facts,
    write_record,
    write_recovered_weights,
)
from cfsp.settings import Compute, EvaluationText, Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
ADAPTER_DIRECTORY = "adapter"
# Nothing takes the same time twice.
_MARGIN = 1.15
# Seconds that processes wait for each other, as the Trainer lets them.
_PATIENCE = 1800.0
# Names of places in the work directory.
_TRAIN, _BEFORE = "train", "before"


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
    keep_adapter: bool = False,
    command: str = "",
    started: float | None = None,
) -> RecoverReport:
    """Train a pruned checkpoint and write the result as a plain checkpoint of the same layout.

    A run that was killed left its work beside `out`; the same call goes on from it. Under torchrun
    every process calls this with the same arguments; the first one writes.

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
        keep_adapter: also write the adapter, into `out/adapter`.
        command: what the user typed, for the manifest.
        started: when the minutes of `training` began, in seconds of `time.monotonic()`; None for
            now.

    Raises:
        CfspError: anything that a user can cause; no output is left behind.
    """
    started, watch = time.monotonic() if started is None else started, Stopwatch()
    adaptation = adaptation or Adaptation()
    request = Request(
        source=source,
        out=out,
        data=data,
        training=training,
        adaptation=adaptation,
        teacher=teacher,
        evaluation=evaluation if evaluation is not None and evaluation.names else None,
        compute=compute or Compute(),
        keep_adapter=keep_adapter,
        command=command,
        started=started,
    )
    if is_first_process():
        remove_finished_work(out)
    prepared = prepare(request, watch)
    if not is_first_process():
        return _recover(request, prepared, watch, None)
    with created_parents(out), output_workplace(out, prepared.identity) as place:
        check_output_is_free(out)  # another run may have been at work meanwhile
        report = _recover(request, prepared, watch, place)
    limit = request.training.limit.seconds
    if limit is not None and (took := time.monotonic() - started) > limit:
        logger.warning(
            f"recovery took {took / 60:.1f} minutes, more than --max-minutes {limit / 60:g}; it "
            f"made {report.steps} training steps: give it more, or smaller --batch-windows"
        )
    return report


def _recover(
    request: Request, prepared: Prepared, watch: Stopwatch, place: Workplace | None
) -> RecoverReport:
    """Do the work; only the first process has a place, and writes."""
    source = request.source
    baseline = _measured_before(request, prepared, watch, place)
    device, dtype = compute_device(request.compute.device), request.compute.dtype

    def load(which: Checkpoint) -> PreTrainedModel:
        return load_to_train(which, device, dtype, stays_on_cpu=request.training.shard)

    def attached(model: PreTrainedModel) -> tuple[nn.Module, list[TrainableBlock]]:
        return attach(
            model, source.architecture, prepared.targets, request.adaptation, prepared.rank_L
        )

    with watch.stage("load"):
        model = load(source)
        dense = None if prepared.teacher is None else load(prepared.teacher)
    method = request.adaptation.method
    names = trained_parameters(model, prepared.targets, method)
    training = request.training.with_rate_for(method, size_of_weights(model, names))
    torch.manual_seed(training.seed)
    adapted, blocks = attached(model)
    _tell_what_is_trained(blocks, training)
    later = _seconds_to_write(source, watch) + (baseline.seconds if baseline else 0)
    with watch.stage("train"), joined(device, _PATIENCE) if training.shard else nullcontext():
        outcome = _train(request, training, prepared, place, adapted, model, dense, _MARGIN * later)
        trained = {}
        if training.shard:
            trained = trained_tensors(adapted, keeps=place is not None)
    if not outcome.best_step:
        raise _nothing_gained(outcome, source)
    if place is None:
        return recover_report(blocks, outcome, {}, watch, request.out)
    del dense
    if training.shard:
        # The parts of this process are not all: what was trained goes into the model as it was.
        del adapted, model
        with watch.stage("load"):
            model = load(source)
            adapted, _ = attached(model)
            adapted.load_state_dict(trained, strict=False)
    with staged_directory(request.out) as staging:
        with watch.stage("write"):
            if request.keep_adapter:
                save_adapter(adapted, source, staging / ADAPTER_DIRECTORY)
            merged = merge(adapted)
            digests = write_recovered_weights(source, merged, names, staging)
            copy_everything_else(source, staging)
        del adapted, model, merged
        measured = {}
        if baseline is not None and prepared.evaluation is not None:
            with watch.stage("evaluate"):
                measured = before_and_after(baseline, staging, prepared.evaluation, request.compute)
        report = recover_report(blocks, outcome, measured, watch, request.out)
        facts = recovery_facts(
            report,
            prepared.text,
            training,
            request.adaptation,
            request.teacher,
            device=device,
            command=request.command,
        )
        write_record(source, staging, facts, digests)
    return report


def _nothing_gained(outcome: TrainingOutcome, source: Checkpoint) -> RecoveryError:
    before, *after = (entry["perplexity"] for entry in outcome.history)
    return RecoveryError(
        f"training did not make the held-out perplexity lower ({before:.2f} before, "
        f"{min(after):.2f} at best in {counted(outcome.steps, 'steps')}), so nothing is written, "
        f"and {source.label} is the best there is; give it more steps or minutes, other text, or "
        "another --learning-rate"
    )


def _tell_what_is_trained(blocks: Sequence[TrainableBlock], training: Training) -> None:
    """Say how many parameters are trained, and how fast; the report has those of each block."""
    if not is_first_process():
        return
    ranks = [block.rank for block in blocks if block.rank is not None]
    of_rank = f" of rank {min(ranks)} to {max(ranks)}" if ranks else ""
    total = sum(block.parameters for block in blocks)
    logger.info(
        f"training {total:,d} parameters{of_rank} in {len(blocks)} blocks, learning rate "
        f"{training.learning_rate:g}"
    )


def _measured_before(
    request: Request, prepared: Prepared, watch: Stopwatch, place: Workplace | None
) -> Baseline | None:
    """Return the perplexity before training, which the first process measures if it is asked to."""
    if place is None or prepared.evaluation is None:
        return None
    with watch.stage("evaluate"):
        return baseline_of(
            request.source.directory,
            prepared.evaluation,
            request.compute,
            request.training.limit.seconds,
            PassState(place.directory_of(_BEFORE), prepared.identity),
        )


def _train(
    request: Request,
    training: Training,
    prepared: Prepared,
    place: Workplace | None,
    adapted: nn.Module,
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    after_training: float,
) -> TrainingOutcome:
    """Train, from where a killed run was; the first process notes what there is to go on from."""
    directory, callbacks = directory_of_process(request.out) / _TRAIN, []
    if place is not None:
        state = PassState(place.directory_of(_TRAIN), prepared.identity)
        callbacks = [SaveState(state)]
    # Without a state, what lies there is not complete, and the first process removes it.
    goes_on = (directory / STATE_FILE).is_file()
    device = compute_device(request.compute.device)
    return train(
        adapted,
        model,
        prepared.text,
        training,
        directory=directory,
        started=request.started,
        after_training=after_training,
        resume_from=last_checkpoint(directory) if goes_on else None,
        teacher=dense,
        distillation=request.teacher.distillation if request.teacher else None,
        callbacks=callbacks,
        shard=partial(_shard, request.source, adapted, model, prepared.teacher, dense, device)
        if training.shard
        else None,
    )


def _shard(
    source: Checkpoint,
    adapted: nn.Module,
    model: PreTrainedModel,
    teacher: Checkpoint | None,
    dense: PreTrainedModel | None,
    device: torch.device,
) -> None:
    """Leave this process its part of the model and of the teacher, if there is one."""
    shard(adapted, model, source.architecture, device)
    if teacher is not None and dense is not None:
        shard(dense, dense, teacher.architecture, device)


def _seconds_to_write(source: Checkpoint, watch: Stopwatch) -> float:
    """Return what merging, writing and loading again may take, by what loading took."""
    nbytes = sum(spec.nbytes for spec in source.specs.values())
    return watch.seconds["load"] + nbytes / BYTES_PER_SECOND

"""One training run: from an adapted model and windows to trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint
from cfsp.processes import process_count
from cfsp.recovery.data import RecoveryText
from cfsp.recovery.model_loss import loss_inside
from cfsp.recovery.recover_report import TrainingOutcome
from cfsp.recovery.schedule import Schedule, StepSchedule, TimeSchedule
from cfsp.recovery.settings import ENDLESS_STEPS, Distillation, Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

# A slow disk writes so much; better is measured as soon as something is written.
BYTES_PER_SECOND = 200e6


def train(
    adapted: nn.Module,
    model: PreTrainedModel,
    text: RecoveryText,
    training: Training,
    *,
    directory: Path,
    started: float,
    after_training: float = 0.0,
    resume_from: Path | None = None,
    teacher: PreTrainedModel | None = None,
    distillation: Distillation | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    shard: Callable[[], object] | None = None,
) -> TrainingOutcome:
    """Train, and leave the model with the weights of its best evaluation.

    Args:
        adapted: what is trained: the model itself or a PEFT model around it.
        model: the causal LM inside.
        text: training and held-out windows.
        training: how; with a learning rate.
        directory: where the Trainer's checkpoints go.
        started: `time.monotonic()` at the start of the work, which minutes count from.
        after_training: seconds of the limit that are needed after it.
        resume_from: a checkpoint of the same run.
        teacher: a dense model in memory.
        distillation: how much it counts.
        callbacks: what else is told.
        shard: leaves this process its part of model and teacher; None where they stay whole.

    Raises:
        RecoveryError: the loss is NaN or infinite.
    """
    from cfsp.recovery.pace import Pace
    from cfsp.recovery.sharding import ShardedTrainer
    from cfsp.recovery.trainer import RecoveryTrainer, is_finished

    windows_in_step = training.batch_windows * training.accumulate * process_count()
    steps = training.limit.in_steps(len(text.train), windows_in_step)
    if steps is None:
        schedule: Schedule = _timed(
            training,
            started,
            after_training,
            evaluation_steps=len(text.held_out)
            / windows_in_step
            / _forwards_in_step(training, teacher is not None, trains_all=adapted is model),
            trained_bytes=sum(p.nbytes for p in adapted.parameters() if p.requires_grad),
        )
    else:
        schedule = StepSchedule(steps, training.evaluations, started)
    pace = Pace(schedule, windows_in_step * training.seqlen)
    arguments = training_arguments(
        training, directory, steps or ENDLESS_STEPS, model, begins=resume_from is None
    )
    model.config.use_cache = False
    with loss_inside(model, teacher, distillation) as loss, _without_bars():
        if shard is not None:
            shard()
        trainer = (RecoveryTrainer if shard is None else ShardedTrainer)(
            adapted,
            arguments,
            text,
            schedule=schedule,
            loss=loss,
            warm_up=training.warm_up,
            callbacks=[pace, *callbacks],
        )
        if resume_from is not None and is_finished(resume_from):
            trainer.take_up_finished(resume_from, pace)
        else:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    best_step = trainer.state.best_global_step
    perplexity = {entry["step"]: entry["perplexity"] for entry in pace.history}
    return TrainingOutcome(
        steps=trainer.state.global_step,
        best_step=best_step if perplexity[best_step] < perplexity[0] else 0,
        tokens_in_step=windows_in_step * training.seqlen,
        tokens_per_second=round(pace.tokens_per_second, 1),
        history=pace.history,
    )


def _timed(
    training: Training,
    started: float,
    after_training: float,
    *,
    evaluation_steps: float,
    trained_bytes: int,
) -> TimeSchedule:
    """Return the schedule of a number of minutes."""
    assert training.limit.seconds is not None
    return TimeSchedule(
        training.limit.seconds,
        training.evaluations,
        started,
        # Then the best weights are read again.
        after_training=after_training + trained_bytes / BYTES_PER_SECOND,
        evaluation_steps=evaluation_steps,
        # The weights and AdamW's two moments.
        save_seconds=3 * trained_bytes / BYTES_PER_SECOND,
    )


def _forwards_in_step(training: Training, has_teacher: bool, *, trains_all: bool) -> float:
    """Return about how many forward passes over its windows a step takes as long as.

    Backward through frozen weights is one, and one more for the gradients of all weights.
    """
    return 2.5 + 0.5 * trains_all + has_teacher + training.gradient_checkpointing


def training_arguments(
    training: Training, directory: Path, steps: int, model: PreTrainedModel, *, begins: bool
) -> TrainingArguments:
    """Return the Trainer's arguments for a run of at most `steps` steps that begins or goes on."""
    from transformers import TrainingArguments

    on_cpu = model.device.type == "cpu"
    checkpointing: dict[str, Any] = {}
    if training.gradient_checkpointing:
        # The newer name is there in versions that warn of the older one.
        known = {field.name for field in fields(TrainingArguments)}
        name = "activation_checkpointing"
        name = name if name in known else "gradient_checkpointing"
        checkpointing = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=training.batch_windows,
        per_device_eval_batch_size=training.batch_windows,
        gradient_accumulation_steps=training.accumulate,
        **checkpointing,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=model.dtype == torch.bfloat16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and process_count() > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        # The held-out loss before training is what every later one is compared with.
        eval_on_start=begins,
        # The clock decides when; the Trainer only needs to know that it may.
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=ENDLESS_STEPS,
        save_steps=ENDLESS_STEPS,
        logging_strategy="steps",
        logging_steps=10,
        logging_nan_inf_filter=False,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        save_total_limit=2,
        seed=training.seed,
        data_seed=training.seed,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silence transformers' own progress bars, one for each checkpoint that is saved."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_to_train(
    source: Checkpoint | str, device: torch.device, dtype: str, *, stays_on_cpu: bool = False
) -> PreTrainedModel:
    """Load a model in what its device multiplies fast: float32 where bfloat16 is emulated.

    Args:
        source: the model.
        device: where it will compute.
        dtype: what it computes in; `auto` for what suits both.
        stays_on_cpu: whether its blocks go to the device later.
    """
    name = source.directory if isinstance(source, Checkpoint) else source
    model = load(name, dtype=dtype)
    if dtype == "auto" and model.dtype != torch.float32 and not computes_bfloat16(device):
        model = model.float()
    return model if stays_on_cpu else model.to(device)


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 natively; emulation is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return False

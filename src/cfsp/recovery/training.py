"""One training run: from an adapted model and windows to trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint
from cfsp.processes import process_count
from cfsp.recovery.data import RecoveryText
from cfsp.recovery.loss import ModelLoss
from cfsp.recovery.schedule import Schedule, TimeSchedule
from cfsp.recovery.settings import ENDLESS_STEPS, Training
from cfsp.streaming.pass_state import STATE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

# A slow disk writes so much; better is measured as soon as something is written.
BYTES_PER_SECOND = 200e6


@dataclass(frozen=True)
class TrainingOutcome:
    """What training did.

    Attributes:
        steps: optimizer steps, those before an interruption included.
        best_step: the step with the lowest held-out loss, whose weights were kept; 0 where training
            made it no lower than it was.
        tokens_in_step: tokens of one step, over all processes.
        tokens_per_second: of training, without evaluations.
        history: step, loss on held-out text (of the same kind) and of training, in nats, at each
            evaluation, the first before training.
    """

    steps: int
    best_step: int
    tokens_in_step: int
    tokens_per_second: float
    history: list[dict[str, float]]


def schedule_of(
    adapted: nn.Module,
    text: RecoveryText,
    training: Training,
    *,
    has_teacher: bool,
    started: float,
    after_training: float = 0.0,
) -> Schedule:
    """Return when to evaluate and to stop: after a number of steps or, without one, of minutes.

    Minutes count from `started`, a `time.monotonic()`; of them `after_training` seconds are needed
    after it.
    """
    windows_in_step, seconds = training.windows_in_step, training.limit.seconds
    steps = training.limit.in_steps(len(text.train), windows_in_step)
    if steps is not None:
        return Schedule(steps, training.evaluations, started)
    assert seconds is not None
    # Backward through frozen weights takes as long as forward, and once more for the gradients of
    # all weights.
    trains_all = not hasattr(adapted, "peft_config")
    forwards = 2.5 + 0.5 * trains_all + has_teacher + training.gradient_checkpointing
    trained_bytes = sum(p.nbytes for p in adapted.parameters() if p.requires_grad)
    return TimeSchedule(
        seconds,
        training.evaluations,
        started,
        # Then the best weights are read again.
        after_training=after_training + trained_bytes / BYTES_PER_SECOND,
        evaluation_steps=len(text.held_out) / windows_in_step * (1 + has_teacher) / forwards,
        # The weights and AdamW's two moments.
        save_seconds=3 * trained_bytes / BYTES_PER_SECOND,
    )


def train(
    adapted: Any,
    text: RecoveryText,
    training: Training,
    *,
    schedule: Schedule,
    loss: ModelLoss,
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingOutcome:
    """Train, and leave the model with the weights of its best evaluation.

    That is a causal LM, or a PEFT model around it, sharded if that is asked, which was given the
    loss function. The Trainer's checkpoints are in the directory; those of a run that has a state
    there go on.
    """
    from cfsp.recovery.sharding import ShardedTrainer
    from cfsp.recovery.trainer import Pace, RecoveryTrainer, is_finished, last_checkpoint

    # Without a state, what lies there is not complete, and the first process removes it.
    goes_on = (directory / STATE_FILE).is_file()
    resume_from = last_checkpoint(directory) if goes_on else None
    tokens_in_step = training.windows_in_step * training.seqlen
    pace = Pace(schedule, tokens_in_step)
    adapted.config.use_cache = False
    with _without_bars():
        trainer = (ShardedTrainer if training.shard else RecoveryTrainer)(
            adapted,
            training_arguments(
                training, directory, schedule.most_steps, adapted, begins=resume_from is None
            ),
            text,
            schedule=schedule,
            loss=loss,
            callbacks=[pace, *callbacks],
        )
        if resume_from is not None and is_finished(resume_from):
            trainer.take_up_finished(resume_from, pace)
        else:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    best_step = trainer.state.best_global_step
    held_out = {entry["step"]: entry["held_out"] for entry in pace.history}
    return TrainingOutcome(
        steps=trainer.state.global_step,
        best_step=best_step if held_out[best_step] < held_out[0] else 0,
        tokens_in_step=tokens_in_step,
        tokens_per_second=round(pace.tokens_per_second, 1),
        history=pace.history,
    )


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
        **checkpointing,
        learning_rate=training.learning_rate,
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
    source: Checkpoint, device: torch.device, dtype: str, *, stays_on_cpu: bool
) -> PreTrainedModel:
    """Load a model in what its device multiplies fast: float32 where bfloat16 is emulated."""
    model = load(source.directory, dtype=dtype)
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

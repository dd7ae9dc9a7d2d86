"""Training, through transformers' Trainer: what differs from its defaults, and nothing else.

- The model's loss function is ours (`model_loss.py`).
- A `Schedule` says when to evaluate, to save and to stop; it may count minutes.
- A loss that is not finite stops the run.

Shapes: B windows, T tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from cfsp.errors import RecoveryError
from cfsp.recovery.loss import IGNORED
from cfsp.recovery.model_loss import ModelLoss
from cfsp.recovery.saved import STATE_FILE, progress_in, progress_of
from cfsp.recovery.schedule import Schedule, rate_factor
from cfsp.recovery.settings import Distillation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from cfsp.recovery.data import RecoveryText


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with our loss, schedule and stop.

    Args:
        model: what to train: a causal LM or a PEFT model of one.
        args: as for Trainer.
        text: training and held-out windows.
        schedule: when to evaluate and to stop.
        loss: the loss function that the model was given.
        warm_up: part of the run in which the learning rate rises.
        teacher: a dense model in memory.
        distillation: how much it counts; needed with a teacher.
        callbacks: more of them.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        text: RecoveryText,
        *,
        schedule: Schedule,
        loss: ModelLoss,
        warm_up: float,
        teacher: PreTrainedModel | None,
        distillation: Distillation | None,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=text.train,
            eval_dataset=text.held_out,
            data_collator=_stack,
            callbacks=[_Pace(schedule), *callbacks],
        )
        # Our reporter prints instead.
        self.remove_callback(PrinterCallback)
        self._schedule = schedule
        self._loss = loss
        self._warm_up = warm_up
        self._teacher = teacher
        self._distillation = distillation
        self._held_out_labels = float((text.held_out.label_NT != IGNORED).sum(1).float().mean())

    def take_up_finished(self, checkpoint: Path) -> None:
        """Load the best weights of a run that was stopped after its last step, and its state.

        The Trainer itself would train for one more step.
        """
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        if self.state.best_model_checkpoint is not None:
            self._load_best_model()
        else:
            self._load_from_checkpoint(str(checkpoint))

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return learning rates that follow the schedule."""
        rates = LambdaLR(
            optimizer or self.optimizer,
            lambda step: rate_factor(self._schedule.fraction, self._warm_up),
        )
        self.lr_scheduler = rates
        # As in the Trainer's own method: a later train() makes a new one.
        self._created_lr_scheduler = True
        return rates

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss; the teacher counts in training only.

        The Trainer averages an evaluation over windows, however many labels each has. With the same
        count for all of them that is the mean over labels, for batches of any size.
        """
        self._loss.distillation = self._distillation
        self._loss.teacher = None
        self._loss.labels_in_window = None if model.training else self._held_out_labels
        num_items_in_batch = num_items_in_batch if model.training else None
        if model.training and self._teacher is not None:
            self._loss.teacher = self._loss.ask(self._teacher, inputs["input_ids"])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch, and stop if the loss is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise _diverged(self.state, "the loss")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record how far the run is, which an interrupted run goes on from."""
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise _diverged(self.state, "the held-out loss")
        super().log({**logs, **progress_of(self._schedule)}, start_time)


class _Pace(TrainerCallback):  # type: ignore[misc]
    """Evaluates, saves and stops when the schedule says so."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        # Of the evaluation before the first step, so far.
        self._batches = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up an interrupted run."""
        self._schedule.training_begins()
        if state.global_step:
            elapsed, fraction = progress_in(state.log_history)
            self._schedule.go_on_from(elapsed, fraction)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to train after the evaluation before the first step."""
        if not state.global_step:
            self._schedule.training_begins()

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Note how long the evaluation before the first step takes."""
        if not state.global_step:
            self._batches += 1
            self._schedule.batch_evaluated(self._batches, len(eval_dataloader), args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the time of an evaluation from that of a step."""
        if self._schedule.evaluates:
            self._schedule.evaluated()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step; the learning rate is asked for next."""
        # The Trainer counts the step after this.
        self._schedule.step_done(state.global_step + 1, args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for what is due."""
        schedule = self._schedule
        if schedule.evaluates or schedule.is_over:
            control.should_log = control.should_save = True
        if schedule.evaluates:
            control.should_evaluate = True
        if schedule.is_over:
            control.should_training_stop = True


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _diverged(state: Any, what: str) -> RecoveryError:
    return RecoveryError(
        f"{what} is NaN or infinite at step {state.global_step + 1}; "
        "start again with a lower --learning-rate, or in --dtype float32"
    )

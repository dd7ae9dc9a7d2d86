"""Training, through transformers' Trainer: what differs from its defaults, and nothing else.

- The model's loss function is ours (`model_loss.py`).
- The schedule follows a `RunClock`, which may count minutes.
- Checkpoints are written at evaluations, a fixed number of times in a run.
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
from cfsp.recovery.loss import Distillation, TeacherTopK
from cfsp.recovery.model_loss import ModelLoss
from cfsp.recovery.schedule import RunClock, rate_factor
from cfsp.recovery.teacher import LOG_PROB_FIELD, TOKEN_FIELD
from cfsp.recovery.workspace import STATE_FILE

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from cfsp.recovery.data import RecoveryText


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with our loss, schedule and stop.

    Args:
        model: what to train: a causal LM or a PEFT model of one.
        args: as for Trainer.
        text: training and held-out windows.
        clock: how long the run lasts.
        loss: the loss function that the model was given.
        warm_up: part of the run in which the learning rate rises.
        teacher: a dense model in memory.
        distillation: how to distil, from the teacher or from what the windows carry of one.
        evaluations: how often in the run to evaluate and save.
        callbacks: more of them.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        text: RecoveryText,
        *,
        clock: RunClock,
        loss: ModelLoss,
        warm_up: float,
        teacher: PreTrainedModel | None,
        distillation: Distillation | None,
        evaluations: int,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=text.train,
            eval_dataset=text.held_out,
            data_collator=_stack,
            callbacks=[_Pace(clock, evaluations), *callbacks],
        )
        # Our reporter prints instead.
        self.remove_callback(PrinterCallback)
        self._clock = clock
        self._loss = loss
        self._warm_up = warm_up
        self._teacher = teacher
        self._distillation = distillation

    def take_up_finished(self, checkpoint: Path) -> None:
        """Load the best weights of a run that was stopped after its last step, and its state.

        The Trainer itself would train for one more step.
        """
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        self._load_best_model()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LambdaLR:
        """Return a schedule that follows the clock."""
        schedule = LambdaLR(
            optimizer or self.optimizer,
            lambda step: rate_factor(self._clock.fraction, self._warm_up),
        )
        self.lr_scheduler = schedule
        # As in the Trainer's own method: a later train() makes a new one.
        self._created_lr_scheduler = True
        return schedule

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss; the teacher counts in training only."""
        stored = {k: inputs.pop(k, None) for k in (TOKEN_FIELD, LOG_PROB_FIELD)}
        self._loss.distillation = self._distillation
        self._loss.teacher = None
        if model.training and self._distillation is not None:
            if self._teacher is not None:
                self._loss.teacher = self._loss.ask(self._teacher, inputs["input_ids"])
            else:
                self._loss.teacher = TeacherTopK(
                    stored[TOKEN_FIELD].flatten(0, 1).long(),
                    stored[LOG_PROB_FIELD].flatten(0, 1),
                )
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch, and stop if the loss is not a number."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise _diverged(self.state, self.args, "the loss")
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record how long the run has lasted, which an interrupted run continues from."""
        if not math.isfinite(logs.get("eval_loss", 0.0)):
            raise _diverged(self.state, self.args, "the held-out loss")
        super().log({**logs, "elapsed_seconds": round(self._clock.elapsed, 3)}, start_time)


class _Pace(TrainerCallback):  # type: ignore[misc]
    """Evaluates, saves and stops when the clock says so."""

    def __init__(self, clock: RunClock, evaluations: int) -> None:
        self._clock = clock
        self._evaluations = evaluations
        self._before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up an interrupted run."""
        if state.global_step:
            seconds = [entry.get("elapsed_seconds", 0.0) for entry in state.log_history]
            self._clock.continue_from(max(seconds, default=0.0))
            self._clock.update(state.global_step, args.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step; the schedule reads the clock next."""
        self._before = self._clock.fraction
        # The Trainer counts the step after this.
        self._clock.update(state.global_step + 1, args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for what is due."""
        over = self._clock.fraction >= 1
        due = [math.floor(f * self._evaluations) for f in (self._before, self._clock.fraction)]
        if over or due[1] > due[0]:
            control.should_log = control.should_evaluate = control.should_save = True
        if over:
            control.should_training_stop = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Leave time for an evaluation like this one at the end."""
        self._clock.reserved_seconds = metrics.get("eval_runtime", 0.0)


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def _diverged(state: Any, args: Any, what: str) -> RecoveryError:
    best = state.best_model_checkpoint
    kept = f"the best checkpoint so far is kept in {best}" if best else "none was saved before"
    return RecoveryError(
        f"{what} is not a number at step {state.global_step + 1}; {kept}; "
        "start again with a lower --learning-rate, or in --dtype float32"
    )

"""Training, through transformers' Trainer: what differs from its defaults, and nothing else.

- The model's loss function is ours (`model_loss.py`).
- A `Schedule` says when to evaluate, to save and to stop (`pace.py`); it may count minutes.
- A loss that is not finite stops the run.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cfsp.recovery.loss import IGNORED
from cfsp.recovery.model_loss import ModelLoss
from cfsp.recovery.pace import Pace, diverged, saved_pace
from cfsp.recovery.schedule import Schedule, rate_factor

if TYPE_CHECKING:
    from transformers import TrainingArguments

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
        callbacks: what else is told.
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
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=text.train,
            eval_dataset=text.held_out,
            data_collator=_stack,
            callbacks=callbacks,
        )
        # `Pace` prints instead.
        self.remove_callback(PrinterCallback)
        self._schedule = schedule
        self._loss = loss
        self._warm_up = warm_up
        self._held_out_labels = float((text.held_out.label_NT != IGNORED).sum(1).float().mean())

    def take_up_finished(self, checkpoint: Path, pace: Pace) -> None:
        """Load the best weights of a run that was stopped after its last step, and its state.

        The Trainer itself would train for one more step.
        """
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        pace.take_up(self.state)
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
        self._loss.labels_in_window = None if model.training else self._held_out_labels
        num_items_in_batch = num_items_in_batch if model.training else None
        self._loss.taught = self._loss.ask(inputs["input_ids"]) if model.training else None
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch, and stop if the loss is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise diverged(self.state.global_step + 1, "the loss")
        return loss


def last_checkpoint(directory: Path) -> Path | None:
    """Return the newest complete checkpoint; a killed process may have left half of one."""
    numbered = [
        (path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), path) for path in directory.glob("*")
    ]
    complete = [(int(n), path) for n, path in numbered if n.isdigit() and _state(path) is not None]
    return max(complete)[1] if complete else None


def is_finished(checkpoint: Path) -> bool:
    """Return whether a complete checkpoint was saved after the last step of its run."""
    state = _state(checkpoint)
    assert state is not None, checkpoint
    return bool(saved_pace(state)["fraction"] >= 1)


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """Return the Trainer's state, which it writes last; None if it is not whole."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return state


def _stack(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}

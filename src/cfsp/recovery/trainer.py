"""Training, through transformers' Trainer: what differs from its defaults, and nothing else.

- The model's loss function is ours (`loss.py`).
- A `Schedule` says when to evaluate, to save and to stop; it may count minutes.
- A loss that is not finite stops the run.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cfsp.architecture.block_names import counted
from cfsp.errors import RecoveryError
from cfsp.processes import is_first_process
from cfsp.progress import item_progress
from cfsp.recovery.loss import IGNORED, ModelLoss
from cfsp.recovery.schedule import Schedule, rate_factor

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from cfsp.recovery.data import RecoveryText

logger = logging.getLogger(__name__)
_PARTS = 1000
# The first step is slow, and no measure of the others.
_WARM_STEPS = 2


class RecoveryTrainer(Trainer):  # type: ignore[misc]
    """A Trainer with our schedule and the loss function that the model was given."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        text: RecoveryText,
        *,
        schedule: Schedule,
        loss: ModelLoss,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model,
            args,
            train_dataset=text.train,
            eval_dataset=text.held_out,
            callbacks=callbacks,
        )
        # `Pace` prints instead.
        self.remove_callback(PrinterCallback)
        self._schedule = schedule
        self._loss = loss
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
            optimizer or self.optimizer, lambda step: rate_factor(self._schedule.fraction)
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
        """Return the loss, of held-out text the same that training lowers.

        The Trainer averages an evaluation over windows, however many labels each has. With the same
        count for all of them that is the mean over labels, for batches of any size.
        """
        self._loss.labels_in_window = None if model.training else self._held_out_labels
        num_items_in_batch = num_items_in_batch if model.training else None
        self._loss.taught = self._loss.ask(inputs["input_ids"])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch, and stop if the loss is not finite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not math.isfinite(float(loss)):
            raise _diverged(self.state.global_step + 1, "the loss")
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
    return bool(_saved_pace(state)["fraction"] >= 1)


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """Return the Trainer's state, which it writes last; None if it is not whole."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return state


class Pace(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Evaluates, saves and stops when the schedule says so, and shows how far the run is.

    The Trainer saves its `state` with every checkpoint. A step has so many tokens over all
    processes.
    """

    def __init__(self, schedule: Schedule, tokens_in_step: int) -> None:
        # Step, held-out loss, and loss (none before the first step) at each evaluation.
        self.history: list[dict[str, float]] = []
        self._schedule = schedule
        self._tokens_in_step = tokens_in_step
        self._shown = is_first_process()
        self._bar: tqdm | None = None  # type: ignore[type-arg]
        self._loss = math.nan
        self._first_step = self._steps = 0
        # Of the evaluation before the first step, so far.
        self._batches = 0

    @property
    def tokens_per_second(self) -> float:
        """Rate of training in this process's part of the run, without evaluations."""
        return self._steps * self._tokens_in_step / max(self._schedule.training_seconds, 1e-6)

    def state(self) -> dict[str, Any]:
        """Return what an interrupted run goes on from."""
        schedule = self._schedule
        return {
            "elapsed": round(schedule.elapsed, 3),
            "fraction": schedule.fraction,
            "history": self.history,
        }

    def take_up(self, state: Any) -> None:
        """Take up an interrupted run, from the state of its Trainer."""
        saved, self._first_step = _saved_pace(vars(state)), state.global_step
        # The Trainer sorts what it saves; a run that went on writes what one in one go does.
        order = ("step", "held_out", "loss")
        self.history = [
            {key: entry[key] for key in order if key in entry} for entry in saved["history"]
        ]
        self._schedule.go_on_from(saved["elapsed"], saved["fraction"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._schedule.training_begins()
        if state.global_step:
            self.take_up(state)
        if self._shown:
            self._bar = item_progress("recover", _PARTS, "‰", initial=self._parts_done())

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Note how long the evaluation before the first step takes."""
        if not state.global_step:
            self._batches += 1
            self._schedule.batch_evaluated(self._batches, len(eval_dataloader), args.device)
        self._move_bar()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the time of an evaluation from that of a step."""
        if self._schedule.evaluates:
            self._schedule.evaluated()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step, which the Trainer counts later; the learning rate is asked for next."""
        self._schedule.step_done(state.global_step + 1, args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for what is due."""
        schedule, self._steps = self._schedule, state.global_step - self._first_step
        control.should_log |= schedule.evaluates or schedule.is_over
        control.should_save |= schedule.evaluates or schedule.is_over
        control.should_evaluate |= schedule.evaluates
        control.should_training_stop |= schedule.is_over
        rate = f"{self._loss_in_words()}{self.tokens_per_second:,.0f} tok/s"
        self._move_bar(f"step {state.global_step}, {rate}")
        if self._shown and self._steps == _WARM_STEPS and (fits := schedule.what_fits):
            logger.info(f"after {counted(state.global_step, 'steps')}: {fits} more")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the loss."""
        self._loss = logs.get("loss", self._loss)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Say where the run is, and begin to train after the evaluation before the first step."""
        schedule, loss, step = self._schedule, metrics["eval_loss"], state.global_step
        if not math.isfinite(loss):
            raise _diverged(step + 1, "the held-out loss")
        entry = {"step": step, "held_out": round(loss, 6)}
        if math.isfinite(self._loss):
            entry["loss"] = round(self._loss, 4)
        self.history.append(entry)
        if self._shown:
            if self._bar is not None:
                self._bar.clear()
            # Before the first step only the clock says how much there will be.
            pace = schedule.what_fits
            if self._steps:
                left = int(schedule.seconds_left)
                pace = f"{self.tokens_per_second:,.0f} tokens/s, {left // 60}:{left % 60:02d} left"
            logger.info(
                f"step {step}, {schedule.progress:.0%}: {self._loss_in_words()}held-out loss "
                f"{loss:.4f}{pace and ', '}{pace}"
            )
        if not step:
            schedule.training_begins()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _loss_in_words(self) -> str:
        """Return the loss of the last steps that were logged; nothing before the first."""
        return "" if math.isnan(self._loss) else f"loss {self._loss:.3f}, "

    def _parts_done(self) -> int:
        return round(self._schedule.progress * _PARTS)

    def _move_bar(self, said: str = "") -> None:
        if self._bar is not None:
            if said:
                self._bar.set_postfix_str(said, refresh=False)
            self._bar.update(self._parts_done() - self._bar.n)


def _saved_pace(trainer_state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the pace that a Trainer saved with its own."""
    saved: dict[str, Any] = trainer_state["stateful_callbacks"][Pace.__name__]
    return saved


def _diverged(step: int, what: str) -> RecoveryError:
    return RecoveryError(
        f"{what} is NaN or infinite at step {step}; "
        "start again with a lower --learning-rate, or in --dtype float32"
    )

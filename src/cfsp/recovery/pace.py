"""What happens between the steps of a run, and what is shown of it and saved of it."""

from __future__ import annotations

import logging
import math
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from cfsp.architecture.block_names import counted
from cfsp.errors import RecoveryError
from cfsp.processes import is_first_process
from cfsp.progress import item_progress
from cfsp.recovery.schedule import Schedule

logger = logging.getLogger(__name__)
_PARTS = 1000
# The first step is slow, and no measure of the others.
_WARM_STEPS = 2


class Pace(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Evaluates, saves and stops when the schedule says so, and shows how far the run is.

    The Trainer saves its `state` with every checkpoint.

    Args:
        schedule: of the run.
        tokens_in_step: tokens that an optimizer step trains on, over all processes.

    Attributes:
        history: step, held-out perplexity and loss (without one before the first step) at each
            evaluation.
    """

    def __init__(self, schedule: Schedule, tokens_in_step: int) -> None:
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
        saved, self._first_step = saved_pace(vars(state)), state.global_step
        self.history = saved["history"]
        self._schedule.go_on_from(saved["elapsed"], saved["fraction"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self._schedule.training_begins()
        if state.global_step:
            self.take_up(state)
        if self._shown:
            self._bar = item_progress("recover", _PARTS, "‰", done=self._parts_done())

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
        """Say where the run is, and begin to train after the evaluation before the first step.

        Raises:
            RecoveryError: the held-out loss is NaN or infinite.
        """
        schedule, loss, step = self._schedule, metrics["eval_loss"], state.global_step
        if not math.isfinite(loss):
            raise diverged(step + 1, "the held-out loss")
        entry = {"step": step, "perplexity": round(math.exp(min(loss, 700.0)), 4)}
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
                f"step {step}, {schedule.progress:.0%}: {self._loss_in_words()}held-out perplexity "
                f"{entry['perplexity']:.2f}{pace and ', '}{pace}"
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


def saved_pace(trainer_state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of the pace that a Trainer saved with its own."""
    saved: dict[str, Any] = trainer_state["stateful_callbacks"][Pace.__name__]
    return saved


def diverged(step: int, what: str) -> RecoveryError:
    """Return the error of a loss that is not finite."""
    return RecoveryError(
        f"{what} is NaN or infinite at step {step}; "
        "start again with a lower --learning-rate, or in --dtype float32"
    )

"""What is shown while training runs: a bar on a terminal, and a line after each evaluation."""

from __future__ import annotations

import logging
import math
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from cfsp.architecture.block_names import counted
from cfsp.progress import item_progress
from cfsp.recovery.schedule import Schedule

logger = logging.getLogger(__name__)
_PARTS = 1000
# The first step is slow, and no measure of the others.
_WARM_STEPS = 2


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Shows loss, tokens per second, time left and held-out perplexity.

    Args:
        schedule: of the run.
        tokens_in_step: tokens that an optimizer step trains on, over all processes.
        shown: whether this process speaks.

    Attributes:
        history: one entry for each evaluation.
    """

    def __init__(self, schedule: Schedule, tokens_in_step: int, shown: bool) -> None:
        self.history: list[dict[str, float]] = []
        self._schedule = schedule
        self._tokens_in_step = tokens_in_step
        self._shown = shown
        self._bar: tqdm | None = None  # type: ignore[type-arg]
        self._loss = math.nan
        self._first_step = 0
        self._started = 0.0
        self._tokens = 0
        self._evaluating = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Rate of training in this process's part of the run, without evaluations."""
        return self._tokens / max(self._schedule.elapsed - self._started - self._evaluating, 1e-6)

    @property
    def _loss_in_words(self) -> str:
        """The loss of the last steps that were logged; nothing before the first."""
        return "" if math.isnan(self._loss) else f"loss {self._loss:.3f}, "

    @property
    def _parts_done(self) -> int:
        """What the bar shows."""
        return round(self._schedule.progress * _PARTS)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, and take up what an interrupted run reported."""
        self.take_up(state)
        if self._shown:
            self._bar = item_progress("recover", _PARTS, "‰", done=self._parts_done)

    def take_up(self, state: TrainerState) -> None:
        """Take up what an interrupted run reported."""
        self._first_step = state.global_step
        self._started = self._schedule.elapsed
        for entry in state.log_history:
            self._loss = entry.get("loss", self._loss)
            if "eval_loss" in entry:
                self._note({**entry, "loss": self._loss})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._tokens = (state.global_step - self._first_step) * self._tokens_in_step
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"step {state.global_step}, {self._loss_in_words}"
                f"{self.tokens_per_second:,.0f} tok/s",
                refresh=False,
            )
            self._bar.update(self._parts_done - self._bar.n)
        is_warm = state.global_step == self._first_step + _WARM_STEPS
        if self._shown and is_warm and (fits := self._schedule.what_fits):
            logger.info(f"after {counted(state.global_step, 'steps')}: {fits} more")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._parts_done - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Remember the loss."""
        self._loss = logs.get("loss", self._loss)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Say where the run is."""
        self._evaluating += metrics.get("eval_runtime", 0.0)
        entry = self._note({**metrics, "step": state.global_step, "loss": self._loss})
        if self._shown:
            if self._bar is not None:
                self._bar.clear()
            # Before the first step only the clock says how much there will be.
            pace = (
                f"{self.tokens_per_second:,.0f} tokens/s, "
                f"{_minutes(self._schedule.seconds_left)} left"
                if self._tokens
                else self._schedule.what_fits
            )
            logger.info(
                f"step {state.global_step}, {self._schedule.progress:.0%}: "
                f"{self._loss_in_words}held-out perplexity {entry['perplexity']:.2f}"
                f"{pace and ', '}{pace}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    def _note(self, metrics: dict[str, float]) -> dict[str, float]:
        entry = {
            "step": metrics["step"],
            "perplexity": round(math.exp(min(metrics["eval_loss"], 700.0)), 4),
        }
        if math.isfinite(metrics.get("loss", math.nan)):
            entry["loss"] = round(metrics["loss"], 4)
        self.history.append(entry)
        return entry


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

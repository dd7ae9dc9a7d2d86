"""When to train, to evaluate and to stop, and the learning rate over a run.

A run is limited by steps or by time. The learning rate rises in the first few percent and then
falls along a cosine to zero at the end; where time is the limit, the part of the time that has
passed takes the place of the part of the steps, so that the cosine is complete however fast the
machine.

Time is a promise about the whole recovery. Steps and evaluations are measured as they happen, and
what comes after training (the last evaluation, the output, perplexity) is kept free for. A step or
an evaluation begins only if it fits. The evaluation before the first step tells how long that step
will take; if it and its evaluation do not fit, the run ends there.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

import torch

from cfsp.architecture.block_names import counted
from cfsp.errors import UsageError
from cfsp.recovery.settings import ENDLESS_STEPS

# The part of the run in which the learning rate rises, and where it begins.
_WARM_UP = 0.05
_LOWEST_WARM_UP = 0.05
# Of the time for training; evaluations that would take more are left out.
_EVALUATIONS_SHARE = 0.25
# The first batch is slow: others may take this part of its time.
_LEAST_OF_FIRST = 0.25
# Nothing takes the same time twice: so much more time is advised than was predicted.
MARGIN = 1.15


def rate_factor(fraction: float) -> float:
    """Return what the peak learning rate is multiplied by, after a fraction of the run."""
    if fraction < _WARM_UP:
        return max(_LOWEST_WARM_UP, fraction / _WARM_UP)
    return 0.5 * (1 + math.cos(math.pi * (fraction - _WARM_UP) / (1 - _WARM_UP)))


class Schedule:
    """What a run of a number of steps does after each of them, the same on every process.

    There are so many `evaluations` at most, the one at the end included; `now` is a clock that
    never goes back, at which the work of this process `started`.
    """

    # What will be done, in words, where that depends on how long it takes.
    what_fits: str = ""

    def __init__(
        self,
        steps: int,
        evaluations: int,
        started: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most_steps = steps
        self.fraction = 0.0  # of the run that is over
        # Whether to evaluate and save after the step that was noted last, and to stop.
        self.evaluates = self.is_over = False
        self.training_seconds = 0.0  # of the steps that this process saw
        self._most_evaluations = evaluations
        self._started = started
        self._now = now
        # When what is measured now began.
        self._mark = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, those before an interruption included."""
        return self._now() - self._started

    @property
    def seconds_left(self) -> float:
        """Estimate of the seconds until the end."""
        return self.elapsed * (1 - self.fraction) / max(self.fraction, 1e-6)

    @property
    def progress(self) -> float:
        """Part of the whole work that is over, in [0, 1]."""
        return self.fraction

    def go_on_from(self, elapsed: float, fraction: float) -> None:
        """Count what an interrupted run had done: seconds, and the part that was over."""
        self._started -= elapsed
        self.fraction = fraction
        self._mark = self.elapsed

    def training_begins(self) -> None:
        """Note that the first step begins, or the evaluation before it."""
        self._mark = self.elapsed

    def batch_evaluated(self, done: int, batches: int, device: torch.device) -> None:
        """Note that so many batches of the evaluation before the first step are done."""

    def evaluated(self) -> None:
        """Note that evaluating and saving are done and the next step begins."""
        self._mark = self.elapsed

    def step_done(self, step: int, device: torch.device) -> None:
        """Note that so many steps are done, and decide; processes talk on `device`."""
        before, self._mark = self._mark, self.elapsed
        self.training_seconds += self._mark - before
        fraction, evaluates, is_over = self._decide(step, self._mark - before, device)
        assert fraction >= self.fraction
        self.fraction, self.evaluates, self.is_over = fraction, bool(evaluates), bool(is_over)

    def _decide(self, step: int, seconds: float, device: torch.device) -> tuple[float, ...]:
        """Return the fraction that is over, whether to evaluate, and whether this is the end."""
        fraction = min(1.0, step / self.most_steps)
        is_over = fraction >= 1
        passes = _passes_mark(self.fraction, fraction, self._most_evaluations)
        return fraction, is_over or passes, is_over


class TimeSchedule(Schedule):
    """An amount of time for the whole recovery, of which some is needed after training.

    What an evaluation takes is estimated in steps, what saving takes in seconds.
    """

    def __init__(
        self,
        seconds: float,
        evaluations: int,
        started: float,
        *,
        after_training: float,
        evaluation_steps: float,
        save_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(ENDLESS_STEPS, evaluations, started, now)
        self._seconds = seconds
        self._after_training = after_training
        self._evaluation_steps = evaluation_steps
        self._save_seconds = save_seconds
        self._begin = 0.0
        # When the first batch of the evaluation before the first step was done.
        self._warm = 0.0
        # Of the last few: the first step is slow, and machines change.
        self._step_seconds: deque[float] = deque(maxlen=3)
        self._evaluation_seconds: deque[float] = deque(maxlen=3)

    @property
    def seconds_left(self) -> float:
        """Estimate of the seconds until the end."""
        return max(0.0, self._seconds - self.elapsed)

    @property
    def progress(self) -> float:
        """Part of the time that is over, in [0, 1]."""
        return min(1.0, self.elapsed / self._seconds)

    @property
    def what_fits(self) -> str:  # type: ignore[override]
        """How many more steps and evaluations the time is enough for."""
        if self.is_over:
            return ""
        left, evaluations = self._left()
        left -= (evaluations - 1) * self._seconds_of_evaluation()
        steps = max(1, int(left / self._seconds_of_step()))
        evaluations -= math.floor(self.fraction * evaluations)
        return f"time for about {counted(steps, 'steps')} and {counted(evaluations, 'evaluations')}"

    def training_begins(self) -> None:
        """Note that the first step begins, or the evaluation before it."""
        super().training_begins()
        self._begin = self._warm = self._mark

    def batch_evaluated(self, done: int, batches: int, device: torch.device) -> None:
        """Note how far the evaluation before the first step is."""
        batch = (self.elapsed - self._warm) / max(1, done - 1)
        forward = batches * batch
        self._evaluation_seconds.clear()
        self._evaluation_seconds.append(forward + self._save_seconds)
        known = self.elapsed + self._after_training + self._save_seconds
        expected = (batches - done) * batch + forward / self._evaluation_steps + forward
        least = expected
        if done == 1 < batches:
            self._warm = self.elapsed
            least *= _LEAST_OF_FIRST
        (too_short,) = _from_first_process((float(known + least > self._seconds),), device)
        if too_short:
            raise UsageError(
                f"{self._seconds / 60:g} minutes are too short for one step of training and its "
                "evaluation, with what comes before and after; give "
                f"{math.ceil(MARGIN * (known + expected) / 60)} or more"
            )

    def evaluated(self) -> None:
        """Note that evaluating and saving are done and the next step begins."""
        self._evaluation_seconds.append(self.elapsed - self._mark)
        super().evaluated()

    def _decide(self, step: int, seconds: float, device: torch.device) -> tuple[float, ...]:
        self._step_seconds.append(seconds)
        step_seconds, trained = self._seconds_of_step(), self._mark - self._begin
        left, evaluations = self._left()
        if is_over := left < step_seconds:
            fraction, evaluates = 1.0, True
        else:
            fraction = max(self.fraction, trained / (trained + left))
            evaluates = _passes_mark(self.fraction, fraction, evaluations)
            evaluates &= left >= self._seconds_of_evaluation() + step_seconds
        return _from_first_process((fraction, evaluates, is_over), device)

    def _left(self) -> tuple[float, int]:
        """Return the seconds until the last evaluation, and how many there are in the whole run."""
        left = self._seconds - self._after_training - self._mark
        evaluation = self._seconds_of_evaluation()
        worth = int(_EVALUATIONS_SHARE * (self._mark - self._begin + left) / evaluation)
        # The last weights are compared with those from before training.
        return left - evaluation, max(1, min(self._most_evaluations, worth))

    def _seconds_of_step(self) -> float:
        """Return what a step takes, measured or, before the first, estimated."""
        if self._step_seconds:
            return max(*self._step_seconds, 1e-6)
        forward = self._seconds_of_evaluation() - self._save_seconds
        return max(forward / self._evaluation_steps, 1e-6)

    def _seconds_of_evaluation(self) -> float:
        """Return what evaluating and saving take, measured or, where a run goes on, estimated."""
        if self._evaluation_seconds:
            return max(*self._evaluation_seconds, 1e-6)
        return self._evaluation_steps * self._seconds_of_step() + self._save_seconds


def _passes_mark(before: float, now: float, parts: int) -> bool:
    """Return whether one of several even parts of the run has ended meanwhile."""
    return math.floor(now * parts) > math.floor(before * parts)


def _from_first_process(decision: tuple[float, ...], device: torch.device) -> tuple[float, ...]:
    """Return the first process's decision: clocks differ; learning rates and stops must not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision
    numbers = torch.tensor(decision, dtype=torch.float32, device=device)
    torch.distributed.broadcast(numbers, src=0)
    return tuple(numbers.tolist())

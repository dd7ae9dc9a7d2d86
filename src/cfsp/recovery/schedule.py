"""When to train, to evaluate and to stop, and the learning rate over a run.

A run is limited by steps or by time. The learning rate rises in the first few percent and then
falls along a cosine to zero at the end; where time is the limit, the part of the time that has
passed takes the place of the part of the steps, so that the cosine is complete however fast the
machine.

Time is a promise about the whole recovery. Steps and evaluations are measured as they happen, and
what comes after training (the last evaluation, the output, perplexity) is kept free for. A step or
an evaluation begins only if it fits; the first step is always made.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import torch

_LOWEST_WARM_UP = 0.05
# Of the time for training; evaluations that would take more are left out.
_EVALUATIONS_SHARE = 0.25
# A step goes forward and backward: an evaluation of as many windows takes half of it at most.
_FORWARD_SHARE = 0.5


def rate_factor(fraction: float, warm_up: float) -> float:
    """Return what the peak learning rate is multiplied by.

    Args:
        fraction: part of the run that is over, in [0, 1].
        warm_up: part of the run in which the rate rises.
    """
    if fraction < warm_up:
        return max(_LOWEST_WARM_UP, fraction / warm_up)
    return 0.5 * (1 + math.cos(math.pi * (fraction - warm_up) / (1 - warm_up)))


class Schedule(ABC):
    """What a run does after each step, the same on every process.

    Args:
        started: when the work of this process began, in seconds of `now`.
        now: a clock that never goes back.

    Attributes:
        fraction: part of the run that is over, in [0, 1].
        evaluates: whether to evaluate and save after the step that was noted last.
        is_over: whether that step was the last one.
    """

    def __init__(self, started: float, now: Callable[[], float]) -> None:
        self.fraction = 0.0
        self.evaluates = False
        self.is_over = False
        self._started = started
        self._now = now
        # When what is measured now began.
        self._mark = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, those before an interruption included."""
        return self._now() - self._started

    @property
    @abstractmethod
    def seconds_left(self) -> float:
        """Estimate of the seconds until the end."""

    def go_on_from(self, elapsed: float, fraction: float) -> None:
        """Count what an interrupted run had done.

        Args:
            elapsed: seconds of its work.
            fraction: part of the run that was over.
        """
        self._started -= elapsed
        self.fraction = fraction

    def training_begins(self) -> None:
        """Note that the first step begins."""
        self._mark = self.elapsed

    def evaluated(self) -> None:
        """Note that evaluating and saving are done and the next step begins."""
        self._mark = self.elapsed

    @abstractmethod
    def step_done(self, step: int, device: torch.device) -> None:
        """Note that a step is done, and decide.

        Args:
            step: how many steps are done.
            device: where processes talk to each other.
        """


class StepSchedule(Schedule):
    """A number of steps.

    Args:
        steps: of the run.
        evaluations: how many, the one at the end included.
        started: see `Schedule`.
        now: see `Schedule`.
    """

    def __init__(
        self,
        steps: int,
        evaluations: int,
        started: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(started, now)
        self._steps = steps
        self._evaluations = evaluations

    @property
    def seconds_left(self) -> float:
        """Estimate of the seconds until the end."""
        return self.elapsed * (1 - self.fraction) / max(self.fraction, 1e-6)

    def step_done(self, step: int, device: torch.device) -> None:
        """Note that a step is done, and decide."""
        before, self.fraction = self.fraction, min(1.0, step / self._steps)
        self.is_over = self.fraction >= 1
        self.evaluates = self.is_over or _passes_mark(before, self.fraction, self._evaluations)


class TimeSchedule(Schedule):
    """An amount of time.

    Args:
        seconds: of the whole recovery.
        evaluations: how many at most, the one at the end included.
        started: see `Schedule`.
        after_training: seconds that are needed after it.
        held_out_steps: held-out windows, in steps of as many windows.
        save_seconds: estimate of what saving takes.
        now: see `Schedule`.
    """

    def __init__(
        self,
        seconds: float,
        evaluations: int,
        started: float,
        *,
        after_training: float,
        held_out_steps: float,
        save_seconds: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(started, now)
        self._seconds = seconds
        self._most_evaluations = evaluations
        self._after_training = after_training
        self._held_out_steps = held_out_steps
        self._save_seconds = save_seconds
        self._begin = 0.0
        self._has_evaluated = False
        # Of the last few: the first step is slow, and machines change.
        self._step_seconds: deque[float] = deque(maxlen=3)
        self._evaluation_seconds: deque[float] = deque(maxlen=3)

    @property
    def seconds_left(self) -> float:
        """Estimate of the seconds until the end."""
        return max(0.0, self._seconds - self.elapsed)

    def training_begins(self) -> None:
        """Note that the first step begins."""
        super().training_begins()
        self._begin = self._mark

    def go_on_from(self, elapsed: float, fraction: float) -> None:
        """Count what an interrupted run had done."""
        super().go_on_from(elapsed, fraction)
        self._mark = self.elapsed
        self._has_evaluated = True

    def evaluated(self) -> None:
        """Note that evaluating and saving are done and the next step begins."""
        self._evaluation_seconds.append(self.elapsed - self._mark)
        self._has_evaluated = True
        super().evaluated()

    def step_done(self, step: int, device: torch.device) -> None:
        """Note that a step is done, and decide."""
        self._step_seconds.append(self.elapsed - self._mark)
        self._mark = self.elapsed
        decision = _from_first_process(self._decide(), device)
        assert decision[0] >= self.fraction
        self.fraction, self.evaluates, self.is_over = decision

    def _decide(self) -> tuple[float, bool, bool]:
        """Return the fraction that is over, whether to evaluate, and whether this is the end."""
        step, evaluation = max(self._step_seconds), self._seconds_of_evaluation()
        trained = self._mark - self._begin
        left = self._seconds - self._after_training - self._mark
        worth = int(_EVALUATIONS_SHARE * (trained + left) / evaluation)
        # The last weights are compared with earlier ones, so they are evaluated if those were.
        evaluations = max(int(self._has_evaluated), min(self._most_evaluations, worth))
        left -= evaluation if evaluations else self._save_seconds
        if left < step:
            return 1.0, evaluations > 0, True
        fraction = max(self.fraction, trained / (trained + left))
        evaluates = _passes_mark(self.fraction, fraction, evaluations)
        return fraction, evaluates and left >= evaluation + step, False

    def _seconds_of_evaluation(self) -> float:
        """Return what evaluating and saving take, measured or, before that, estimated."""
        if self._evaluation_seconds:
            return max(*self._evaluation_seconds, 1e-6)
        forward = _FORWARD_SHARE * max(self._step_seconds) * self._held_out_steps
        return max(forward + self._save_seconds, 1e-6)


def _passes_mark(before: float, now: float, parts: int) -> bool:
    """Return whether one of several even parts of the run has ended meanwhile."""
    return math.floor(now * parts) > math.floor(before * parts)


def _from_first_process(
    decision: tuple[float, bool, bool], device: torch.device
) -> tuple[float, bool, bool]:
    """Return the first process's decision: clocks differ; learning rates and stops must not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return decision
    numbers = torch.tensor(decision, dtype=torch.float32, device=device)
    torch.distributed.broadcast(numbers, src=0)
    fraction, evaluates, is_over = numbers.tolist()
    return fraction, bool(evaluates), bool(is_over)

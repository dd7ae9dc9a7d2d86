"""How long training lasts, and the learning rate over that time.

The limit is a number of steps or minutes. The learning rate rises in the first few percent and
then falls along a cosine to zero at the limit; with minutes, the part of the time that has passed
takes the place of the part of the steps, so that the cosine is complete however fast the machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from cfsp.errors import UsageError

# What a run without a limit of steps reports to the Trainer as its number of steps.
ENDLESS_STEPS = 1_000_000_000
_LOWEST_WARM_UP = 0.05


@dataclass(frozen=True)
class Limit:
    """When training ends: exactly one of the three.

    Raises:
        UsageError: none or several are given, or one is not positive.
    """

    steps: int | None = None
    epochs: float | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.steps, self.epochs, self.minutes) if v is not None]
        if len(given) != 1:
            raise UsageError(
                "expected exactly one of --steps, --epochs and --max-minutes, "
                f"found {len(given)} of them"
            )
        if not 0 < given[0] < ENDLESS_STEPS:
            raise UsageError(
                f"the length of training must be positive and below {ENDLESS_STEPS:,}, "
                f"found {given[0]}"
            )

    def in_steps(self, windows: int, windows_in_step: int) -> int | None:
        """Return the number of optimizer steps; None if only the clock decides.

        Args:
            windows: training windows in an epoch.
            windows_in_step: windows in a step, over all processes.
        """
        if self.epochs is not None:
            return max(1, round(self.epochs * windows / windows_in_step))
        return self.steps


class RunClock:
    """How much of a run is over, the same on every process.

    Args:
        steps: steps of the run; None if `seconds` limits it.
        seconds: seconds of the run, evaluations included.
        started: `time.monotonic()` at the start of this process's work.
    """

    def __init__(self, steps: int | None, seconds: float | None, started: float) -> None:
        self.steps = steps
        self.seconds = seconds
        self.fraction = 0.0
        # Time that the last evaluation needs has to be left over.
        self.reserved_seconds = 0.0
        self._started = started

    @property
    def elapsed(self) -> float:
        """Seconds of work so far, those before an interruption included."""
        return time.monotonic() - self._started

    def continue_from(self, elapsed: float) -> None:
        """Count the seconds that an interrupted run had spent."""
        self._started -= elapsed

    def update(self, step: int, device: torch.device) -> None:
        """Note that a step is done."""
        if self.steps is not None:
            self.fraction = min(1.0, step / self.steps)
            return
        assert self.seconds is not None
        usable = max(self.seconds - self.reserved_seconds, 1e-3)
        fraction = torch.tensor(min(1.0, self.elapsed / usable), device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Clocks differ; learning rates must not.
            torch.distributed.broadcast(fraction, src=0)
        self.fraction = max(self.fraction, float(fraction))

    @property
    def seconds_left(self) -> float:
        """Estimate of the seconds until the end."""
        if self.seconds is not None:
            return max(0.0, self.seconds - self.elapsed)
        return self.elapsed * (1 - self.fraction) / max(self.fraction, 1e-6)


def rate_factor(fraction: float, warm_up: float) -> float:
    """Return what the peak learning rate is multiplied by.

    Args:
        fraction: part of the run that is over, in [0, 1].
        warm_up: part of the run in which the rate rises.
    """
    if fraction < warm_up:
        return max(_LOWEST_WARM_UP, fraction / warm_up)
    return 0.5 * (1 + math.cos(math.pi * (fraction - warm_up) / (1 - warm_up)))

"""What a user may aim at instead of a fraction of channels, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cfsp.errors import UsageError
from cfsp.text.sources import Text

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = ("decode", "prefill")
DEFAULT_WINDOWS = 12


@dataclass(frozen=True)
class TargetParameters:
    """Keep a fraction of the whole model's parameters.

    Attributes:
        fraction: of all parameters that stays, in (0, 1].
    """

    fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UsageError(f"--target-params must be in (0, 1], found {self.fraction}")


@dataclass(frozen=True)
class MaxLossIncrease:
    """Prune as much as keeps the loss within a bound.

    The bound holds for the pruned model before restoration, on text that calibration has not seen.

    Attributes:
        nats: by how much the mean negative log-likelihood of a token may rise.
        held_out: texts to measure it on; none for windows of the calibration texts that
            calibration leaves over.
        windows: how many windows in all, or of each text in `held_out`.
    """

    nats: float
    held_out: tuple[str | Text, ...] = ()
    windows: int = DEFAULT_WINDOWS

    def __post_init__(self) -> None:
        if not 0 < self.nats < float("inf"):
            raise UsageError(f"--max-loss-increase must be above 0 nats, found {self.nats}")
        if self.windows < 1:
            raise UsageError(f"--held-out-windows must be at least 1, found {self.windows}")


@dataclass(frozen=True)
class TargetSpeedup:
    """Prune as little as makes the model this much faster on this machine.

    Attributes:
        ratio: tokens per second over those of the model as it is, above 1.
        phase: what shall be faster.
    """

    ratio: float
    phase: Phase = "decode"

    def __post_init__(self) -> None:
        if not 1 < self.ratio < float("inf"):
            raise UsageError(f"--target-speedup must be above 1, found {self.ratio}")
        if self.phase not in PHASES:
            raise UsageError(
                f"--target-speedup-of must be one of {', '.join(PHASES)}, found {self.phase!r}"
            )


Goal = TargetParameters | MaxLossIncrease | TargetSpeedup

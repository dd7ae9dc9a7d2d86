"""What to aim at instead of a fraction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cfsp.errors import UsageError
from cfsp.settings.options import (
    advanced_option,
    check_declared,
    fraction,
    option,
    options_of,
)

Phase = Literal["decode", "prefill"]
PHASES: tuple[Phase, ...] = get_args(Phase)


def _check_fraction(flag: str, found: float, such_as: str) -> None:
    if not 0 < found <= 1:
        raise UsageError(f"{flag} must be in (0, 1], such as {such_as}, found {found}")


@dataclass(frozen=True)
class TargetParameters:
    """The goal to keep a fraction of the whole model's parameters.

    Attributes:
        fraction: of all parameters that stays, in (0, 1].
    """

    fraction: float = option(
        1.0,
        "fraction of all parameters that stays; without --parts blocks may go, too",
        kind=fraction,
        flag="target-params",
        metavar="F",
        default="",
    )

    def __post_init__(self) -> None:
        _check_fraction("--target-params", self.fraction, "0.7")


@dataclass(frozen=True)
class TargetKVCache:
    """The goal to keep a fraction of the KV cache, by KV groups, whole attentions, or both.

    Attributes:
        fraction: of the cache of the longest context that stays at most, in (0, 1].
    """

    fraction: float = advanced_option(
        1.0,
        "fraction of the KV cache that stays; KV groups go, with --parts attention or "
        "kv,attention whole attentions, and nothing else",
        kind=fraction,
        flag="target-kv-cache",
        metavar="F",
        default="",
    )

    def __post_init__(self) -> None:
        _check_fraction("--target-kv-cache", self.fraction, "0.5")


@dataclass(frozen=True)
class TargetSpeedup:
    """The goal to prune as little as makes the model this much faster on this machine.

    Attributes:
        ratio: tokens per second over those of the model as it is, above 1.
        phase: what shall be faster.
    """

    ratio: float = advanced_option(
        2.0,
        "as little as is predicted to make the model X times faster on this machine, which must be "
        "quiet",
        kind=float,
        flag="target-speedup",
        metavar="X",
        default="",
    )
    phase: Phase = advanced_option(
        "decode", "what --target-speedup is about", flag="target-speedup-of", choices=PHASES
    )

    def __post_init__(self) -> None:
        if not 1 < self.ratio < float("inf"):
            raise UsageError(f"--target-speedup must be above 1, found {self.ratio}")
        check_declared(self)


@dataclass(frozen=True)
class MaxLossIncrease:
    """The goal to prune as much as keeps the loss within a bound.

    The bound holds for the pruned model before repair, on text that calibration has not seen.

    Attributes:
        nats: by how much the mean negative log-likelihood of a token may rise.
    """

    nats: float = advanced_option(
        0.1,
        "as much as keeps the loss on held-out text within so many nats per token of the dense "
        "model's, before repair; the model must fit into memory",
        kind=float,
        flag="max-loss-increase",
        metavar="NATS",
        default="",
    )

    def __post_init__(self) -> None:
        if not 0 < self.nats < float("inf"):
            raise UsageError(f"--max-loss-increase must be above 0 nats, found {self.nats}")


Goal = TargetParameters | TargetKVCache | TargetSpeedup | MaxLossIncrease
GOALS: tuple[type[Goal], ...] = get_args(Goal)


def flag_of_goal(goal: type[Goal]) -> str:
    """Return the option that asks for a goal: the first; the others belong to it."""
    return next(iter(options_of(goal).values())).typed

"""How to train, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cfsp.errors import UsageError
from cfsp.recovery.adaptation import Adaptation
from cfsp.recovery.schedule import Limit
from cfsp.settings import Bos, check_bos


@dataclass(frozen=True)
class Training:
    """How to train.

    Attributes:
        limit: when training ends.
        learning_rate: at its peak; None for what suits the method.
        batch_windows: windows that pass together, on each process.
        accumulate: batches in an optimizer step.
        seqlen: tokens in a window, BOS included.
        warm_up: part of the run in which the learning rate rises.
        weight_decay: of AdamW.
        evaluations: how often to evaluate and save.
        gradient_checkpointing: recompute activations: less memory, a third more time.
        seed: of the order of windows and of the adapters' start.
        bos: whether windows begin with BOS; `auto` as the tokenizer begins an input.
    """

    limit: Limit
    learning_rate: float | None = None
    batch_windows: int = 4
    accumulate: int = 1
    seqlen: int = 512
    warm_up: float = 0.05
    weight_decay: float = 0.0
    evaluations: int = 10
    gradient_checkpointing: bool = False
    seed: int = 0
    bos: Bos = "auto"

    def __post_init__(self) -> None:
        check_bos(self.bos)
        for name in ("batch_windows", "accumulate", "evaluations"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise UsageError(f"--{option} must be at least 1, found {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"--seed must be in [0, 2^32), found {self.seed}")


DEFAULT_LEARNING_RATES = {"lora": 1e-3, "dora": 1e-3, "full": 3e-4}


def with_learning_rate(training: Training, adaptation: Adaptation) -> Training:
    """Return the settings with the learning rate that suits the method, if none is given.

    Raises:
        UsageError: the learning rate is not positive.
    """
    if training.learning_rate is not None:
        if not 0 < training.learning_rate < math.inf:
            raise UsageError(f"--learning-rate must be positive, found {training.learning_rate}")
        return training
    return replace(training, learning_rate=DEFAULT_LEARNING_RATES[adaptation.method])

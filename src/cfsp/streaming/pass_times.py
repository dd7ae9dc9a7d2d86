"""What the time of a pass went into: computing, or waiting for something else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Part = Literal["total", "visits", "weights", "hidden_states", "saving"]


class PassTimes:
    """Seconds of one pass over the blocks, by part.

    total          the whole pass, embedding included
    visits         with a block in memory: its forward, the sums, repair if any
    hidden_states  within visits: between the hidden states and the device
    weights        waiting for weights that were not ready; moving and checking them
    saving         putting down what a killed run resumes from
    """

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = {}

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Add the time of a block of code to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def compute(self) -> float:
        """Seconds of pure computing."""
        return self.seconds.get("visits", 0.0) - self.seconds.get("hidden_states", 0.0)

    @property
    def ratio(self) -> float:
        """Total time as a multiple of pure compute time; 1 if nothing was computed."""
        return self.seconds.get("total", 0.0) / self.compute if self.compute > 0 else 1.0

    def to_json(self) -> dict[str, float]:
        """Return seconds by part, those of pure computing, and the ratio."""
        seconds: dict[str, float] = {k: round(v, 3) for k, v in self.seconds.items()}
        return {**seconds, "compute": round(self.compute, 3), "ratio": round(self.ratio, 4)}

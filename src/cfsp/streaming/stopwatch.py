"""Where the time of a command went, stage by stage, and that of a pass over the blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["total", "visits", "weights", "hidden_states", "saving"]


@dataclass
class Stopwatch:
    """Seconds spent in each named stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block of code to a stage, without that of other stages within it."""
        self.seconds.setdefault(name, 0.0)
        start, known = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            of_others = sum(self.seconds.values()) - known
            spent = max(0.0, time.perf_counter() - start - of_others)
            self.seconds[name] = round(self.seconds[name] + spent, 3)


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

    def to_json(self) -> dict[str, float]:
        """Return seconds by part, those of pure computing, and total time as a multiple of them."""
        seconds: dict[str, float] = {k: round(v, 3) for k, v in self.seconds.items()}
        compute = self.seconds.get("visits", 0.0) - self.seconds.get("hidden_states", 0.0)
        ratio = self.seconds.get("total", 0.0) / compute if compute > 0 else 1.0
        return {**seconds, "compute": round(compute, 3), "ratio": round(ratio, 4)}

"""Where the time of a command went, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


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

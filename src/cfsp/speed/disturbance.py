"""How much other programs ran during a run: what they did then is in the timing too."""

from __future__ import annotations

import os

import psutil

# Not idle, not waiting for a disk, not taken by another virtual machine. Some systems lack some.
_WORK = ("user", "nice", "system", "irq", "softirq")


def busy_seconds() -> float:
    """Return the CPU seconds that all processors together have worked since the machine began."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in _WORK))


def share_of_others(before: float, after: float, own_seconds: float, wall_seconds: float) -> float:
    """Return the fraction of all processors that other programs took during a run.

    Args:
        before: `busy_seconds` at the start.
        after: `busy_seconds` at the end.
        own_seconds: CPU seconds of the process that ran.
        wall_seconds: how long it took.
    """
    if wall_seconds <= 0:
        return 0.0
    others = max(0.0, after - before - own_seconds)
    return others / (wall_seconds * (os.cpu_count() or 1))

"""How much other programs ran during a run: what they did then is in the timing too.

Only Linux tells (/proc/stat). Elsewhere nothing counts as disturbed.
"""

from __future__ import annotations

import os
from pathlib import Path

_STAT = Path("/proc/stat")
# user, nice, system, irq, softirq: columns of the line `cpu` that are work, in clock ticks.
_BUSY_COLUMNS = (1, 2, 3, 6, 7)


def busy_seconds() -> float | None:
    """Return the CPU seconds that all processors together have worked since the machine began."""
    try:
        columns = _STAT.read_text().split("\n", 1)[0].split()
        ticks = sum(int(columns[i]) for i in _BUSY_COLUMNS)
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def share_of_others(
    before: float | None, after: float | None, own_seconds: float, wall_seconds: float
) -> float:
    """Return the fraction of all processors that other programs took during a run.

    Args:
        before: `busy_seconds` at the start.
        after: `busy_seconds` at the end.
        own_seconds: CPU seconds of the process that ran.
        wall_seconds: how long it took.
    """
    if before is None or after is None or wall_seconds <= 0:
        return 0.0
    others = max(0.0, after - before - own_seconds)
    return others / (wall_seconds * (os.cpu_count() or 1))

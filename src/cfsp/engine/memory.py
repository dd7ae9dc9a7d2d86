"""How much memory there is, how much this process took, and how much hidden states may take."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from cfsp.processes import processes_on_machine

# The rest is for two blocks, the embeddings and what the computation needs.
_SHARE_OF_AVAILABLE = 0.5

_CGROUP = Path("/sys/fs/cgroup")


def default_budget() -> int:
    """Return how much hidden states may take: half of what is available to this process.

    Processes that torchrun started on this machine share evenly.
    """
    return int(available_bytes() * _SHARE_OF_AVAILABLE / processes_on_machine())


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process since its program began.

    Libraries and weights mapped from files count; processes that it started do not.
    """
    if sys.platform == "linux":
        # Not getrusage: its peak outlives exec, so a program inherits that of who started it.
        peak = _field(Path("/proc/self/status"), "VmHWM")
        if peak is not None:
            return peak * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts in bytes, the others in KiB.
    return usage if sys.platform == "darwin" else usage * 1024


def available_bytes() -> int:
    """Return the memory that can be had without swapping, within the limits of a container."""
    total = psutil.virtual_memory().available
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        # Cached file pages count as used, but give way.
        cached = _field(_CGROUP / "memory.stat", "file") or 0
        total = min(total, max(0, limit - used + cached))
    return total


def _field(path: Path, name: str) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

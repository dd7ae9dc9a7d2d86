"""How much memory there is, and how much of it hidden states may take."""

from __future__ import annotations

import os
from pathlib import Path

# The rest is for two blocks, the embeddings and what the computation needs.
_SHARE_OF_AVAILABLE = 0.5
_UNKNOWN_AVAILABLE = 8 << 30

_CGROUP = Path("/sys/fs/cgroup")


def default_budget() -> int:
    """Return how much hidden states may take: half of what is available to this process.

    Processes that torchrun started on this machine share evenly.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(available_bytes() * _SHARE_OF_AVAILABLE / processes)


def available_bytes() -> int:
    """Return the memory that can be had without swapping, within the limits of a container."""
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    total = available * 1024 if available is not None else _UNKNOWN_AVAILABLE
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
        key, _, value = line.partition(" ")
        if key.rstrip(":") == name:
            return int(value.split()[0])
    return None


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None

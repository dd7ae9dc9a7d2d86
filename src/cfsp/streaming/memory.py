"""How much memory there is, how much this process took, and how much hidden states may take."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from cfsp.processes import processes_on_machine

# The rest is for two blocks, the embeddings and what the computation needs.
_SHARE_OF_AVAILABLE = 0.5

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
# What a group calls its limit, what it uses, cached file pages, and those of them that are files in
# memory (/dev/shm), which do not give way; in version 2 and in version 1.
_VERSION_2 = ("memory.max", "memory.current", "file", "shmem")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")


def hidden_budget(asked: int | None = None) -> int:
    """Return how many bytes hidden states may take: as asked, or half of what is available."""
    if asked is not None:
        return asked
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
    """Return the memory that can be had without swapping, within the limits of containers."""
    total = psutil.virtual_memory().available
    for group, (limit_file, used_file, *fields) in _memory_groups():
        limit, used = _number(group / limit_file), _number(group / used_file)
        if limit is not None and used is not None:
            # Cached file pages count as used, but give way.
            in_files, in_memory = (_field(group / "memory.stat", name) or 0 for name in fields)
            cached = max(0, in_files - in_memory)
            total = min(total, max(0, limit - used + cached))
    return total


def _memory_groups() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Yield each control group that holds this process, and what it calls its numbers."""
    for line in _lines(_OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUPS, _VERSION_2
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", _VERSION_1
        else:
            continue
        # A container may see the path of its host, but only its own groups: what is not there
        # limits nothing.
        own = root / path.lstrip("/")
        for group in (own, *own.parents):
            if group.is_relative_to(root):
                yield group, names


def _field(path: Path, name: str) -> int | None:
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[0] == name:
            return int(words[1])
    return None


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

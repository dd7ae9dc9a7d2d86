"""The folder where models that were converted from .gguf files are kept."""

from __future__ import annotations

import os
from pathlib import Path


def converted_directory() -> Path:
    """Return the folder of all converted models: in $CFSP_CACHE, or in cfsp in the user's cache."""
    users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("CFSP_CACHE") or users / "cfsp") / "gguf"


def directory_bytes(directory: Path) -> int:
    """Return the bytes of all files in a directory and its folders."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())

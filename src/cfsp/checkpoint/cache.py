"""The folder where models that were converted from .gguf files are kept."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from cfsp.errors import OutputError

# The name of the file and the beginning of its SHA-256; since there are several ways to convert,
# the number of the way.
_NAME = re.compile(r".+-[0-9a-f]{16}(-v\d+)?")


def converted_directory() -> Path:
    """Return the folder of all converted models: in $CFSP_CACHE, or in cfsp in the user's cache."""
    users = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("CFSP_CACHE") or users / "cfsp") / "gguf"


def cached_models() -> dict[Path, int]:
    """Return what is in the cache: the directory of each model, and its bytes on disk."""
    folder = converted_directory()
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {
        path: directory_bytes(path)
        for path in found
        if path.is_dir() and _NAME.fullmatch(path.name) and (path / "config.json").is_file()
    }


def clear_cache() -> dict[Path, int]:
    """Delete the converted models, and nothing else that may lie there; return what they were."""
    models = cached_models()
    for directory in models:
        try:
            shutil.rmtree(directory)
        except OSError as error:
            raise OutputError(
                f"cannot delete {error.filename}: {error.strerror}; delete it yourself"
            ) from error
    return models


def directory_bytes(directory: Path) -> int:
    """Return the bytes of all files in a directory and its folders."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())

"""Statistics on disk: one file is one calibration.

It is `statistics.safetensors`: sums of channels as tensors, all else as JSON in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cfsp.checkpoint.output import write_atomically
from cfsp.errors import StatisticsError

STATISTICS_VERSION = 6
# Version 4 has the sum of each activation besides, and both have distances besides the angular one,
# which nothing is made from.
_READ = (4, 5, STATISTICS_VERSION)
_METADATA_KEY = "cfsp_statistics"


def write_facts(path: Path, facts: Mapping[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write JSON types and tensors to one file, atomically.

    Raises:
        OutputError: the place is not writable.
    """
    # One entry only: the library writes several in random order, and the same statistics
    # shall give the same bytes.
    metadata = {_METADATA_KEY: json.dumps({"version": STATISTICS_VERSION, **facts})}
    write_atomically(path, save(tensors, metadata=metadata))


def read_facts(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `write_facts` wrote; nothing but the version is checked.

    Raises:
        StatisticsError: the file is missing, damaged, or of another version.
    """
    if not path.is_file():
        raise StatisticsError(f"{path} does not exist; make it with: cfsp calibrate MODEL")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StatisticsError(
            f"{path} is not a statistics file: {error}; make one with: cfsp calibrate MODEL"
        ) from error
    try:
        facts: dict[str, Any] = json.loads(metadata[_METADATA_KEY])
        version = facts["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StatisticsError(
            f"{path} is not a statistics file; make one with: cfsp calibrate MODEL"
        ) from error
    if version not in _READ:
        raise StatisticsError(
            f"{path} has statistics version {version}, expected {STATISTICS_VERSION}; "
            "calibrate again"
        )
    return facts, tensors

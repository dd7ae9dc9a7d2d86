"""What tests of goals share: a tiny model, its statistics, a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import cfsp


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def statistics(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    cfsp.calibrate(model, data=[text_file], samples=8, seqlen=32).save(path)
    return path

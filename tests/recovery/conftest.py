"""Recoveries into a directory of the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cfsp.recovery.trainer import RecoverReport
from recoveries import recover


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def recovered(pruned, out, text_file) -> Callable[..., RecoverReport]:
    """Recovers a model into `out`."""
    return lambda of=pruned, **options: recover(of, out, text_file, **options)


@pytest.fixture(scope="session")
def plain(pruned, text_file, tmp_path_factory) -> Path:
    """What a recovery by all defaults of these tests gives."""
    out = tmp_path_factory.mktemp("plain") / "out"
    recover(pruned, out, text_file)
    return out

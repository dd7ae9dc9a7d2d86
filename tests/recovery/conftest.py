"""Recoveries of tiny models, small enough for tests, into a directory of the test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import stopped_at
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.recovery.recover import recover_checkpoint
from cfsp.recovery.settings import Adaptation, Limit, RecoverSettings, Training
from cfsp.recovery.trainer import RecoverReport


def training(steps: int = 6, **changes: Any) -> Training:
    options: dict[str, Any] = {"batch_windows": 4, "seqlen": 32, "evaluations": 2} | changes
    return Training(Limit(steps=steps), **options)


def recover(source: Path, out: Path, text: Path, **options: Any) -> RecoverReport:
    started = options.pop("started", None)
    asked: dict[str, Any] = {"data": (str(text),), "training": training()}
    settings = RecoverSettings(**asked | {"adaptation": Adaptation(rank=2)} | options)
    return recover_checkpoint(
        open_checkpoint(source), out, settings, command="cfsp recover pruned", started=started
    )


def stopped(recovering: Callable[..., object], *args: Any, **options: Any) -> None:
    """Let a user stop a recovery after its last step."""
    stopped_at("cfsp.recovery.recover.merge", recovering, *args, **options)


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

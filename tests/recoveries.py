"""Recoveries of tiny models, small enough for tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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

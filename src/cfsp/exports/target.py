"""What an export is asked for, what a format wrote, and what is reported of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from cfsp.exports.verification import Verification


@dataclass(frozen=True)
class ExportOptions:
    """What the user can choose.

    Attributes:
        weight_type: how gguf stores matrices; None for the checkpoint's own type.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer, where it can't be told.
    """

    weight_type: str | None = None
    pre_tokenizer: str | None = None


@dataclass(frozen=True)
class Written:
    """What a format wrote.

    Attributes:
        layout: what software will see: a class, an architecture, a weight type.
        verify: reads the output back and compares it with the checkpoint; raises ExportError.
        notes: what the user should know, one sentence each.
        serve: the command that serves the copy, which is `{out}`.
    """

    layout: str
    verify: Callable[[], Verification]
    notes: tuple[str, ...] = ()
    serve: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What an export did.

    Attributes:
        target: its name.
        out: the new file or directory.
        layout: what software will see.
        nbytes: bytes on disk.
        notes: what the user should know.
        verification: the comparison; None if it was not asked for.
        seconds: stage -> seconds.
        serve: the command that serves the copy; empty if there is none.
    """

    target: str
    out: str
    layout: str
    nbytes: int
    notes: tuple[str, ...]
    verification: Verification | None
    seconds: dict[str, float]
    serve: str

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return {**asdict(self), "notes": list(self.notes)}

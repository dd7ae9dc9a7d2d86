"""What a target is, and what an export is asked for and reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.checkpoint.reading import Checkpoint
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
    """What a target wrote.

    Attributes:
        layout: what software will see: a class, an architecture, a weight type.
        notes: what the user should know, one sentence each.
        serve: the command that serves the copy, which is `{out}`; empty if there is none.
    """

    layout: str
    notes: tuple[str, ...] = ()
    serve: str = ""


@dataclass(frozen=True)
class Target:
    """A format that a checkpoint can be written in.

    Attributes:
        name: on the command line.
        suffix: what the output file's name ends with; empty if the output is a directory.
        write: writes (checkpoint, output, options); raises ExportError for what the format
            cannot express, before anything is written.
        verify: reads the output back and compares it with the checkpoint; raises ExportError.
    """

    name: str
    suffix: str
    write: Callable[[Checkpoint, Path, ExportOptions], Written]
    verify: Callable[[Checkpoint, Path, ExportOptions], Verification]


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
        verification = None if self.verification is None else self.verification.to_json()
        return {**vars(self), "notes": list(self.notes), "verification": verification}

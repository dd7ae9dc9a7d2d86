"""The command of the tests of goals."""

from __future__ import annotations

from pathlib import Path

from cfsp.cli import main


def prune(model: Path, text: Path, out: Path, *more: object) -> int:
    return main(
        ["prune", str(model), "--data", str(text), "--samples", "8", "--seqlen", "32",
         "--multiple", "8", "--out", str(out), *map(str, more)]
    )  # fmt: skip

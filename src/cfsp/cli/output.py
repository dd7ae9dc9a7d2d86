"""What commands print: one JSON object for machines, tables for people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class _PlainLines(logging.Handler):
    """Shows a message as it is, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line to standard error, as it is at that moment."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def show_messages() -> None:
    """Let people see what the library has to say: plain lines on standard error."""
    logger = logging.getLogger("cfsp")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _PlainLines) for handler in logger.handlers):
        logger.addHandler(_PlainLines())


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    json.dump(value, sys.stdout, indent=2)
    print()


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print columns: the first `left` aligned left, the others right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    for number, row in enumerate([head, *rows]):
        cells = [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
        if number == 0:
            print("  ".join("-" * width for width in widths))


def print_passes(passes: Mapping[str, Mapping[str, float]]) -> None:
    """Print how much of each pass over the blocks was pure computing."""
    for name, seconds in passes.items():
        waits = ", ".join(
            f"{part.replace('_', ' ')} {seconds[part]:.1f} s"
            for part in ("weights", "hidden_states", "saving")
            if part in seconds
        )
        print(
            f"{name}: {seconds['ratio']:.2f} times its pure compute time of "
            f"{seconds['compute']:.1f} s ({waits})"
        )


def estimate(found: Mapping[str, Any], digits: int, factor: float = 1.0) -> str:
    """Return a value with its standard error, if there is one: 27.5 ± 1.2.

    Args:
        found: `value` and `stderr`.
        digits: after the point.
        factor: 100 for percent.
    """
    error = found["stderr"]
    shown = f"{factor * found['value']:z.{digits}f}"
    return shown if error is None else f"{shown} ± {factor * error:.{digits}f}"


def human_count(number: float) -> str:
    """Return a count with a suffix: 134.5M."""
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.1f}{suffix}"
    return f"{number:.0f}"


def human_bytes(number: float) -> str:
    """Return a size in binary units: 1.2 GiB."""
    for limit, suffix in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if number >= limit:
            return f"{number / limit:.1f} {suffix}"
    return f"{number:.0f} B"

"""A table for people, as Markdown or in columns; numbers in it; the models that no other beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of text: the first `left` columns name the row, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1

    def to_markdown(self) -> str:
        """Return it as Markdown, its caption first."""
        rule = ["---"] * self.left + ["---:"] * (len(self.head) - self.left)
        # A bar ends a cell even in code.
        bars = ([cell.replace("|", r"\|") for cell in row] for row in (self.head, rule, *self.rows))
        lines = [f"| {' | '.join(row)} |" for row in bars]
        return "\n".join([*([self.caption, ""] if self.caption else []), *lines]) + "\n"

    def to_text(self) -> str:
        """Return columns without the caption: the first ones aligned left, the others right."""
        columns = list(zip(self.head, *self.rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(
                cell.ljust(width) if column < self.left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.head, *self.rows)
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def pareto_front(size_and_loss: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each model whether no other has less of one number and no more of the other."""
    return [
        not any(
            other_size <= size and other_loss <= loss and (other_size, other_loss) != (size, loss)
            for other_size, other_loss in size_and_loss
        )
        for size, loss in size_and_loss
    ]


def estimate(found: Mapping[str, Any], digits: int, factor: float = 1.0) -> str:
    """Return a `value` with its `stderr`, if it has one: 27.5 ± 1.2; percent have a factor."""
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

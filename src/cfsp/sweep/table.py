"""The table of a sweep, as text, Markdown, CSV and JSON, and who is on the Pareto front."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from cfsp.checkpoint.output import write_atomically
from cfsp.sweep.front import pareto_front
from cfsp.sweep.run import Row


def columns(rows: Sequence[Row]) -> list[str]:
    """Return the names of the table's columns."""
    speed = [f"{phase} speed-up" for phase in rows[0].speed]
    texts = [f"perplexity, {text}" for text in rows[0].perplexity]
    return ["model", "sparsity", "parameters", *texts, *speed, "on the front of"]


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table's rows as text.

    The last column names the texts on which the model is on the front of perplexity against
    parameters, by their number in the order of the columns.
    """
    texts = list(rows[0].perplexity)
    fronts = [
        pareto_front([(row.parameters, row.perplexity[text]) for row in rows]) for text in texts
    ]
    return [
        [
            row.name,
            f"{row.sparsity:.4g}",
            str(row.parameters),
            *(f"{row.perplexity[text]:.2f}" for text in texts),
            *(f"{ratio:.3f}" for ratio in row.speed.values()),
            " ".join(str(i + 1) for i, front in enumerate(fronts) if front[number]) or "-",
        ]
        for number, row in enumerate(rows)
    ]


def write_tables(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write table.md, table.csv and table.json."""
    head, body = columns(rows), cells(rows)
    markdown = "\n".join(
        [
            "| " + " | ".join(head) + " |",
            "|---" + "|---:" * (len(head) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in body),
        ]
    )
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([head, *body])
    texts = {
        "table.md": markdown + "\n",
        "table.csv": buffer.getvalue(),
        "table.json": json.dumps([row.to_json() for row in rows], indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(directory / name, text.encode())
    return [directory / name for name in texts]

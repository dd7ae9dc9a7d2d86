"""The tables of a sweep: what every method leaves, and how far that is from the dense model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.output import write_atomically
from cfsp.errors import OutputError
from cfsp.result.facts import Conditions
from cfsp.result.manifest import read_manifest
from cfsp.result.tables import Table, estimate, pareto_front
from cfsp.sweep.settings import Point


@dataclass(frozen=True)
class Row:
    """One model of a finished sweep; the first of a table is the dense one."""

    name: str
    method: str | None  # None for the dense model, as its directory and comparison
    sparsity: float
    parameters: int
    perplexity: Mapping[str, Mapping[str, Any]]  # by text, as `cfsp eval --json` has it
    directory: str | None = None
    comparison: dict[str, Any] | None = None  # what `cfsp.quality.compare.compare` gives

    @staticmethod
    def of(point: Point, directory: Path) -> Row:
        """Return what the manifest of a model says."""
        manifest = read_manifest(directory)
        if manifest is None or "sweep" not in manifest:
            raise OutputError(
                f"{directory} is no model of a sweep; delete it and run the sweep again"
            )
        return Row(
            point.name,
            point.method,
            point.settings.budget.sparsity,
            int(manifest["parameters_after"]),
            {
                text: {"value": found["after"]}
                | {name: found[name] for name in found if name not in ("before", "after")}
                for text, found in manifest["perplexity"].items()
            },
            str(directory),
            manifest.get("comparison"),
        )

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}

    @property
    def conditions(self) -> set[Conditions]:
        """Under which perplexities were measured."""
        return {Conditions.of(text, found) for text, found in self.perplexity.items()}


def read_rows(
    dense: dict[str, Any], parameters: int, points: Sequence[tuple[Point, Path]]
) -> list[Row]:
    """Return the rows of all models, the dense one first; all were measured as that was."""
    rows = [Row.of(*point) for point in points]
    first = Row("dense", None, 0.0, parameters, dense["perplexity"])
    for row in rows:
        if row.conditions != first.conditions:
            raise OutputError(
                f"{row.directory} was not measured as the dense model of its sweep was, perhaps by "
                "another version; delete it and run the sweep again"
            )
    return [first, *rows]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a sweep."""
    compared = any(row.comparison for row in rows)
    return [_qualities(rows), *([_comparisons(rows)] if compared else [])]


def loss_rise(after: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Return by how many nats a token the loss rises between perplexities, in the texts' mean."""
    return fmean(math.log(after[text] / before[text]) for text in before)


def write_tables(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write table.md and, with a line for each model, table.json."""
    texts = {
        "table.md": "\n".join(table.to_markdown() for table in tables(rows)),
        "table.json": json.dumps([asdict(row) for row in rows], indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(directory / name, text.encode())
    return [directory / name for name in texts]


def _table(caption: str, lines: Sequence[Mapping[str, str]]) -> Table:
    return Table(list(lines[0]), [list(line.values()) for line in lines], caption)


def _qualities(rows: Sequence[Row]) -> Table:
    dense = rows[0]
    fronts = [
        pareto_front([(row.parameters, row.values[text]) for row in rows]) for text in dense.values
    ]
    lines = [
        {
            **_names(row),
            "parameters removed": f"{1 - row.parameters / dense.parameters:.1%}",
            **{text: f"{row.values[text]:z,.2f}" for text in dense.values},
            "loss rise": f"{loss_rise(row.values, dense.values):z,.2f}",
            "front": " ".join(str(i + 1) for i, best in enumerate(fronts) if best[number]) or "-",
        }
        for number, row in enumerate(rows)
    ]
    counts = {
        f"{counted(found['windows'], 'windows')} of {found['seqlen']} tokens"
        + (", each after BOS" if found["bos"] else "")
        for found in dense.perplexity.values()
    }
    caption = (
        f"Perplexity on {' or '.join(sorted(counts))} of each text; loss rise in nats a token, "
        "mean of the texts; front: texts, by number, on which nothing smaller is as good."
    )
    return _table(caption, lines)


def _comparisons(rows: Sequence[Row]) -> Table:
    """Return a line for each model: how far it is from the dense one."""
    compared = [(row, row.comparison) for row in rows if row.comparison]
    lines = []
    for row, found in compared:
        line, texts = _names(row), found["texts"].values()
        if all(text["divergence"] for text in texts):
            for column, name, factor, digits in (
                ("KL", "divergence", 1, 3),
                ("top-1 agreement, %", "agreed", 100, 1),
            ):
                mean = factor * fmean(text[name]["second"]["value"] for text in texts)
                line[column] = f"{mean:.{digits}f}"
        if answers := found.get("answers"):
            line["KL on answers"] = estimate(answers["divergence"]["second"], 3)
            line["answers that loop, %"] = estimate(answers["loops"]["second"], 1, 100)
        if found["tasks"]:
            for column, name, side in (
                ("accuracy - dense, %", "accuracy", "difference"),
                ("dense model's answers, %", "kept", "second"),
            ):
                line[column] = estimate(found[name][side], 1, 100) if found[name] else "-"
        lines.append(line)
    caption = (
        "Compared with the dense model in pairs: KL per token in nats and top-1 agreement in the "
        "mean of the texts, tasks in the mean of those on which the dense model is better than a "
        "guess, with standard errors."
    )
    left_out = compared[0][1]["left_out"]
    return _table(caption + (f" Left out: {', '.join(left_out)}." if left_out else ""), lines)


def _names(row: Row) -> dict[str, str]:
    return {"method": row.method or row.name, "sparsity": f"{100 * row.sparsity:.4g}%"}

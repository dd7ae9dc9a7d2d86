"""The rows of a sweep, one for each model, and the tables that they make."""

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
from cfsp.result.manifest import read_manifest, refusing_damage
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
    measured: str = ""  # the digest of all that it was measured by

    def __post_init__(self) -> None:
        # Damage of the file that they are read from shows now.
        _ = self.values, self.beside_dense, self.left_out

    @staticmethod
    def of(point: Point, directory: Path) -> Row:
        """Return what the manifest of a model says."""
        instead = f"delete {directory} and run the sweep again"
        manifest = read_manifest(directory, instead)
        if manifest is None or "sweep" not in manifest:
            raise OutputError(f"{directory} is no model of a sweep; {instead}")
        with refusing_damage(directory, instead):
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
                dict(manifest["comparison"]),
                str(manifest["sweep"]["measured"]),
            )

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}

    @property
    def left_out(self) -> list[str]:
        """What was measured of it and cannot be compared."""
        return [] if self.comparison is None else list(self.comparison["left_out"])

    @property
    def beside_dense(self) -> dict[str, str]:
        """What a table says of how far it is from the dense model, by column."""
        line, found = {}, self.comparison
        if found is None:
            return {}
        for column, name, factor, digits in (
            ("KL", "divergence", 1, 3),
            ("top-1 agreement, %", "agreed", 100, 1),
        ):
            values = [text[name]["second"]["value"] for text in found["texts"].values()]
            line[column] = f"{factor * fmean(values):z.{digits}f}"
        if answers := found.get("answers"):
            line["KL on answers"] = estimate(answers["divergence"]["second"], 3)
            line["answers that loop, %"] = estimate(answers["loops"]["second"], 1, 100)
        if found["tasks"]:
            for column, name, side in (
                ("accuracy - dense, %", "accuracy", "difference"),
                ("dense model's answers, %", "kept", "second"),
            ):
                line[column] = estimate(found[name][side], 1, 100) if found[name] else "-"
        return line


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a sweep."""
    return [_qualities(rows), _comparisons(rows)]


def loss_rise(after: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Return by how many nats a token the loss rises between perplexities, in the texts' mean."""
    return fmean(math.log(after[text] / before[text]) for text in before)


def write_tables(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write table.md and, with a line for each model, table.json."""
    texts = {
        "table.md": "\n".join(table.to_markdown() for table in tables(rows)),
        "table.json": json.dumps(records(rows), indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(directory / name, text.encode())
    return [directory / name for name in texts]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what the tables say of each model, as `--json` and table.json have it."""
    dense = rows[0].values
    fronts = {
        text: pareto_front([(row.parameters, row.values[text]) for row in rows]) for text in dense
    }
    return [
        asdict(row)
        | {
            "loss_rise": loss_rise(row.values, dense),
            "pareto_front": [text for text, best in fronts.items() if best[number]],
        }
        for number, row in enumerate(rows)
    ]


def _qualities(rows: Sequence[Row]) -> Table:
    dense = rows[0]
    number_of = {text: str(number) for number, text in enumerate(dense.values, 1)}
    lines = [
        {
            **_names(row),
            "parameters removed": f"{1 - row.parameters / dense.parameters:.1%}",
            **{text: f"{row.values[text]:z,.2f}" for text in dense.values},
            "loss rise": f"{record['loss_rise']:z,.2f}",
            "Pareto front": " ".join(number_of[text] for text in record["pareto_front"]) or "-",
        }
        for row, record in zip(rows, records(rows), strict=True)
    ]
    counts = {
        f"{counted(found['windows'], 'windows')} of {found['seqlen']} tokens"
        + (", each after BOS" if found["bos"] else "")
        for found in dense.perplexity.values()
    }
    caption = (
        f"Perplexity on {' or '.join(sorted(counts))} of each text; loss rise in nats a token, "
        "mean of the texts; Pareto front: texts, by number, on which nothing smaller is as good."
    )
    return Table(list(lines[0]), [list(line.values()) for line in lines], caption)


def _comparisons(rows: Sequence[Row]) -> Table:
    """Return a line for each model: how far it is from the dense one."""
    pruned = rows[1:]
    lines = [_names(row) | row.beside_dense for row in pruned]
    caption = (
        "Compared with the dense model in pairs: KL per token in nats and top-1 agreement in the "
        "mean of the texts."
    )
    if any("±" in cell for cell in lines[0].values()):
        caption += " Answers and tasks have standard errors."
    if (pruned[0].comparison or {})["tasks"]:
        caption += " Tasks: the mean of those on which the dense model is better than a guess."
    if left_out := pruned[0].left_out:
        caption += f" Left out: {', '.join(left_out)}."
    return Table(list(lines[0]), [list(line.values()) for line in lines], caption)


def _names(row: Row) -> dict[str, str]:
    return {"method": row.method or row.name, "sparsity": f"{100 * row.sparsity:.4g}%"}

"""The tables of a sweep: what every method leaves, and how methods differ on the same windows."""

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
from cfsp.result.tables import Table, estimate, pareto_front

_OF_SEVERAL = " Mean (lowest to highest) of several draws of calibration windows."


@dataclass(frozen=True)
class Row:
    """One model of a finished sweep; the first of a table is the dense one."""

    name: str
    method: str | None  # None for the dense model, as its seed, directory and comparison
    sparsity: float
    seed: int | None
    parameters: int
    perplexity: Mapping[str, Mapping[str, Any]]  # by text, as `cfsp eval --json` has it
    speed: Mapping[str, float | None]  # ratio to the dense model by phase; None if too busy
    directory: str | None = None
    comparison: dict[str, Any] | None = None  # `cfsp.quality.compare.Comparison.to_json`

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a sweep; with several seeds and methods, how methods differ too."""
    found = [_qualities(rows)]
    if any(row.comparison for row in rows):
        found.append(_comparisons(rows))
    methods, seeds = ({getattr(row, name) for row in rows[1:]} for name in ("method", "seed"))
    return [*found, _differences(rows[1:])] if min(len(methods), len(seeds)) > 1 else found


def loss_rise(after: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Return by how many nats a token the loss rises between perplexities, in the texts' mean."""
    return fmean(math.log(after[text] / before[text]) for text in before)


def spread(values: Sequence[float | None]) -> str:
    """Return the mean and, of several, in brackets the lowest and the highest; None is no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "too busy"
    mean = f"{fmean(known):z,.2f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):z,.2f} to {max(known):z,.2f})"


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
    dense, groups = rows[0], _alike(rows)
    several = max(map(len, groups)) > 1
    size = [fmean(row.parameters for row in group) for group in groups]
    fronts = []
    for text in dense.values:
        loss = [fmean(row.values[text] for row in group) for group in groups]
        fronts.append(pareto_front(list(zip(size, loss, strict=True))))
    lines = [
        {
            **_names(group),
            **({"draws": str(len(group))} if several else {}),
            "parameters removed": f"{1 - size[number] / dense.parameters:.1%}",
            **{text: spread([row.values[text] for row in group]) for text in dense.values},
            "loss rise": spread([loss_rise(row.values, dense.values) for row in group]),
            **{f"{at} speed-up": spread([row.speed[at] for row in group]) for at in dense.speed},
            "front": " ".join(str(i + 1) for i, best in enumerate(fronts) if best[number]) or "-",
        }
        for number, group in enumerate(groups)
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
    return _table(caption + (_OF_SEVERAL if several else ""), lines)


def _comparisons(rows: Sequence[Row]) -> Table:
    """Return a line for each model: how far it is from the dense one, and how its answers differ.

    Different draws have lines of their own: a standard error is that of one comparison.
    """
    compared = [(row, row.comparison) for row in rows if row.comparison]
    lines = []
    for row, found in compared:
        line, texts = {**_names([row]), "seed": str(row.seed)}, found["texts"].values()
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


def _differences(rows: Sequence[Row]) -> Table:
    """Return by how many percent each perplexity is above the first method's of the same draw.

    Models of one draw saw the same windows, so that what the windows do to all of them cancels.
    """
    first = rows[0].method
    base = {(row.sparsity, row.seed): row.values for row in rows if row.method == first}

    def above(row: Row, text: str) -> float:
        return 100 * (row.values[text] / base[row.sparsity, row.seed][text] - 1)

    lines = [
        {
            **_names(group),
            "draws": str(len(group)),
            **{text: spread([above(row, text) for row in group]) for text in rows[0].values},
        }
        for group in _alike([row for row in rows if row.method != first])
    ]
    return _table(
        f"Perplexity in percent above that of {first} by the same draw.{_OF_SEVERAL}", lines
    )


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows that differ in nothing but the seed, together."""
    found: dict[tuple[str | None, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.sparsity), []).append(row)
    return list(found.values())


def _names(group: Sequence[Row]) -> dict[str, str]:
    return {
        "method": group[0].method or group[0].name,
        "sparsity": f"{100 * group[0].sparsity:.4g}%",
    }

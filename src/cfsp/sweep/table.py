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
from cfsp.result.tables import pareto_front

_OF_SEVERAL = " Mean (lowest to highest) of several draws of calibration windows."


@dataclass(frozen=True)
class Row:
    """One model of a finished sweep; the first of a table is the dense one.

    Attributes:
        name: what it is called.
        method: name of how it was pruned; None for the dense model.
        sparsity: fraction that was asked for.
        seed: of its calibration; None for the dense model.
        parameters: of the model.
        perplexity: by text `value` and its conditions, as `cfsp eval --json` has them.
        speed: phase -> ratio to the dense model, None where the machine was too busy for a
            verdict; empty if it was not timed.
        directory: what `cfsp report` reads; None for the dense model.
        comparison: with the dense model, window by window and document by document (see
            `cfsp.quality.compare.Comparison.to_json`); None if nothing was compared.
    """

    name: str
    method: str | None
    sparsity: float
    seed: int | None
    parameters: int
    perplexity: Mapping[str, Mapping[str, Any]]
    speed: Mapping[str, float | None]
    directory: str | None = None
    comparison: dict[str, Any] | None = None

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        caption: what it shows.
        lines: by column, the same in all of them.
    """

    caption: str
    lines: Sequence[Mapping[str, str]]

    @property
    def head(self) -> list[str]:
        """Names of the columns."""
        return list(self.lines[0])

    @property
    def rows(self) -> list[list[str]]:
        """Cells."""
        return [list(line.values()) for line in self.lines]

    def to_markdown(self) -> str:
        """Return it as Markdown."""
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join([self.caption, "", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a sweep; with several seeds and methods, how methods differ too.

    Args:
        rows: of the sweep, the dense model first.
    """
    found = [_qualities(rows)]
    if any(row.comparison for row in rows):
        found.append(_comparisons(rows))
    methods, seeds = ({getattr(row, name) for row in rows[1:]} for name in ("method", "seed"))
    return [*found, _differences(rows[1:])] if min(len(methods), len(seeds)) > 1 else found


def loss_rise(after: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Return by how many nats a token the loss rises, in the mean over the texts.

    Args:
        after: perplexity by text.
        before: the same of another model.
    """
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
    return Table(caption + (_OF_SEVERAL if several else ""), lines)


def _comparisons(rows: Sequence[Row]) -> Table:
    """Return a line for each model: how far it is from the dense one, and how its answers differ.

    Different draws have lines of their own: a standard error is that of one comparison.
    """
    compared = [(row, row.comparison) for row in rows if row.comparison]
    lines = []
    for row, found in compared:
        line, texts = {**_names([row]), "seed": str(row.seed)}, found["texts"].values()
        if all(text["divergence"] for text in texts):
            for column, name, scale in (
                ("KL", "divergence", "{:.3f}"),
                ("top-1 agreement, %", "agreed", "{:.1%}"),
            ):
                mean = fmean(text[name]["second"]["value"] for text in texts)
                line[column] = scale.format(mean).removesuffix("%")
        if found["tasks"]:
            line["accuracy - dense, %"] = _percent(found["accuracy"], "difference")
            line["dense model's answers, %"] = _percent(found["kept"], "second")
        lines.append(line)
    caption = (
        "Compared with the dense model in pairs: KL per token in nats and top-1 agreement in the "
        "mean of the texts, tasks in the mean of those on which the dense model is better than a "
        "guess, with standard errors."
    )
    left_out = compared[0][1]["left_out"]
    return Table(caption + (f" Left out: {', '.join(left_out)}." if left_out else ""), lines)


def _percent(pair: Mapping[str, Mapping[str, float | None]] | None, side: str) -> str:
    if pair is None:
        return "-"
    value, error = pair[side]["value"], pair[side]["stderr"]
    assert value is not None
    return f"{100 * value:z.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


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
    return Table(
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

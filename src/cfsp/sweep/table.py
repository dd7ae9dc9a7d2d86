"""The tables of a sweep: what every method leaves, and how methods differ on the same windows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.output import write_atomically
from cfsp.result.front import pareto_front
from cfsp.sweep.measured import Row


@dataclass(frozen=True)
class Table:
    """A table for people.

    Attributes:
        caption: what it shows.
        head: names of the columns.
        rows: cells.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]

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


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and, of several, in brackets the lowest and the highest."""
    mean = f"{fmean(values):z,.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):z,.{digits}f} to {max(values):z,.{digits}f})"


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
    dense, texts = rows[0], list(rows[0].perplexity)
    groups = _alike(rows)
    size = [fmean(row.parameters for row in group) for group in groups]
    fronts = []
    for text in texts:
        loss = [fmean(row.values[text] for row in group) for group in groups]
        fronts.append(pareto_front(list(zip(size, loss, strict=True))))
    several = max(map(len, groups)) > 1
    body = [
        [
            *_names(group[0]),
            *([str(len(group))] if several else []),
            f"{1 - parameters / dense.parameters:.1%}",
            *_text_cells(group, texts, lambda row, text: row.values[text]),
            spread([loss_rise(row.values, dense.values) for row in group]),
            *(spread([row.speed[phase] for row in group]) for phase in dense.speed),
            " ".join(str(i + 1) for i, front in enumerate(fronts) if front[number]) or "-",
        ]
        for number, (group, parameters) in enumerate(zip(groups, size, strict=True))
    ]
    head = [
        *("method", "sparsity", *(["draws"] if several else []), "parameters removed"),
        *(*texts, "loss rise", *(f"{phase} speed-up" for phase in dense.speed), "front"),
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
    return Table(caption + (_OF_SEVERAL if several else ""), head, body)


_OF_SEVERAL = " Mean (lowest to highest) of several draws of calibration windows."


def _comparisons(rows: Sequence[Row]) -> Table:
    """Return a line for each model: how far it is from the dense one, and how its answers differ.

    Different draws have lines of their own: a standard error is that of one comparison.
    """
    compared = [(row, row.comparison) for row in rows if row.comparison]
    texts = list(compared[0][1]["texts"])
    agreement = all(each["divergence"] for each in compared[0][1]["texts"].values())
    tasks = bool(compared[0][1]["tasks"])
    head = ["method", "sparsity", "seed"]
    if agreement:
        head += ["KL", "equal first choices, %"]
    if tasks:
        head += ["accuracy - dense, %", "dense model's answers, %"]
    body = []
    for row, found in compared:
        cells = [*_names(row), str(row.seed)]
        if agreement:
            for name, digits, factor in (("divergence", 3, 1), ("agreed", 1, 100)):
                values = [found["texts"][text][name]["second"]["value"] for text in texts]
                cells.append(f"{factor * fmean(values):.{digits}f}")
        if tasks:
            cells += [_percent(found["accuracy"], "difference"), _percent(found["kept"], "second")]
        body.append(cells)
    caption = (
        "Compared with the dense model in pairs: KL per token in nats and first choices in the "
        "mean of the texts, tasks in the mean of those on which the dense model is better than a "
        "guess, with standard errors."
    )
    left_out = compared[0][1]["left_out"]
    return Table(caption + (f" Left out: {', '.join(left_out)}." if left_out else ""), head, body)


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
    first, texts = rows[0].method, list(rows[0].perplexity)
    base = {(row.sparsity, row.seed): row.values for row in rows if row.method == first}
    body = [
        [
            *_names(group[0]),
            str(len(group)),
            *_text_cells(
                group,
                texts,
                lambda row, text: 100 * (row.values[text] / base[row.sparsity, row.seed][text] - 1),
            ),
        ]
        for group in _alike([row for row in rows if row.method != first])
    ]
    caption = f"Perplexity in percent above that of {first} by the same draw." + _OF_SEVERAL
    return Table(caption, ["method", "sparsity", "draws", *texts], body)


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows that differ in nothing but the seed, together."""
    found: dict[tuple[str | None, float], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.sparsity), []).append(row)
    return list(found.values())


def _names(row: Row) -> list[str]:
    return [row.method or row.name, f"{100 * row.sparsity:.4g}%"]


def _text_cells(
    group: Sequence[Row], texts: Sequence[str], value: Callable[[Row, str], float]
) -> list[str]:
    return [spread([value(row, text) for row in group]) for text in texts]

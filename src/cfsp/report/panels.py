"""Rows of columns, one column for each block, under each other on one horizontal axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cfsp.report.chart import Table
from cfsp.report.drawing import (
    Bands,
    Scale,
    block_axis,
    drawing,
    element,
    hit_area,
    join,
    mark,
    panel_title,
    short_label,
    value_axis,
)
from cfsp.report.run_facts import RunFacts

# Margins: of the drawing, of a panel's heading, below the last panel, between two.
LEFT, RIGHT, TITLE, FOOT, GAP = 52.0, 6.0, 26.0, 40.0, 30.0


@dataclass(frozen=True)
class Column:
    """One block of one panel: what is drawn in it, and what is said about it."""

    say: str
    parts: Markup


@dataclass(frozen=True)
class Panel:
    """A row of columns with a heading and a value axis."""

    title: str
    height: float
    scale: Scale
    labels: dict[float, str]
    columns: Sequence[Column]


def stack_panels(width: int, bands: Bands, panels: Sequence[Panel], label: str) -> Markup:
    """Return panels under each other; scales are relative to each panel's own top."""
    parts: list[Markup] = []
    top = 0.0
    for panel in panels:
        bottom = TITLE + panel.height
        inner = [
            panel_title(panel.title, LEFT, 14),
            value_axis(panel.scale, LEFT, bands.end, panel.labels),
            join(
                mark(column.say, i, hit_area(bands, i, TITLE - 6, bottom), column.parts)
                for i, column in enumerate(panel.columns)
            ),
        ]
        parts.append(element("g", *inner, transform=f"translate(0 {top:g})"))
        top += bottom + GAP
    height = top - GAP
    return drawing(width, height + FOOT, label, *parts, block_axis(bands, height))


def panel_name(title: str, run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """Return a panel's heading: with the run's name where there are several."""
    return title if len(runs) == 1 else f"{short_label(run.name)}: {title[0].lower()}{title[1:]}"


def block_table(
    runs: Sequence[RunFacts],
    nouns: Sequence[str],
    blocks: int,
    cells: Callable[[int, int], Sequence[str]],
) -> Table:
    """Return the table behind a chart by block: a row for each block, columns for each run.

    Args:
        runs: what the chart shows.
        nouns: the columns of one run.
        blocks: how many there are.
        cells: gives the cells of a run, by its position in `runs`, and a block.
    """
    several = len(runs) > 1
    head = [f"{run.name}: {noun}" if several else noun for run in runs for noun in nouns]
    rows = [
        [str(block), *(cell for run in range(len(runs)) for cell in cells(run, block))]
        for block in range(blocks)
    ]
    return Table(["block", *head], rows)


def block_bands(count: int, width: int) -> Bands:
    """Return the columns of `count` blocks in a drawing of this width."""
    return Bands(count, LEFT, width - RIGHT)


def short(value: float) -> str:
    """Return a value with three digits."""
    return f"{value:.3g}"

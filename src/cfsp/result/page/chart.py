"""A chart as a value: its words, its drawing at any width, and the table behind it.

Most charts are rows of columns, one column for each block, under each other on one axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cfsp.result.page.drawing import (
    NARROW,
    WIDE,
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
from cfsp.result.runs import RunFacts

# Margins: of the drawing, of a panel's heading, below the last panel, between two.
LEFT, RIGHT, TITLE, FOOT, GAP = 52.0, 6.0, 26.0, 40.0, 30.0


@dataclass(frozen=True)
class Table:
    """Rows of text; the first column names the row, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Legend:
    """What the marks mean: the class of a swatch, and its name."""

    swatch: str
    name: str


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        key: short name, for anchors.
        title: the heading.
        caption: what it shows and how to read it.
        draw: gives the SVG for a width in pixels.
        table: the same values as text.
        legend: what the marks mean.
    """

    key: str
    title: str
    caption: str
    draw: Callable[[int], Markup]
    table: Table
    legend: Sequence[Legend] = ()

    @property
    def drawings(self) -> list[Markup]:
        """The drawings of the page: for a wide window and for a phone."""
        return [self.draw(WIDE), self.draw(NARROW)]


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
    names: Sequence[str],
    cells: Callable[[int, int], Sequence[str]],
) -> Table:
    """Return the table behind a chart by block: a row for each block, columns for each run.

    Args:
        runs: what the chart shows.
        nouns: the columns of one run.
        names: of the rows.
        cells: gives the cells of a run, by its position in `runs`, and a row.
    """
    several = len(runs) > 1
    head = [f"{run.name}: {noun}" if several else noun for run in runs for noun in nouns]
    rows = [
        [name, *(cell for run in range(len(runs)) for cell in cells(run, row))]
        for row, name in enumerate(names)
    ]
    return Table(["block", *head], rows)


def block_bands(count: int, width: int, blocks: Sequence[int] | None) -> Bands:
    """Return the columns of `count` blocks in a drawing of this width; see `Bands`."""
    return Bands(count, LEFT, width - RIGHT, blocks)

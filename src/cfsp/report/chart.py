"""A chart as a value: its words, its drawing at any width, and the table behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cfsp.report.drawing import NARROW, WIDE


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
        key: short name, for anchors and file names.
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

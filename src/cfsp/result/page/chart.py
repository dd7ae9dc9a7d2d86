"""A chart as a value: its words, its panels, the table behind them; `assets/chart.svg` draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cfsp.result.runs import RunFacts
from cfsp.result.tables import Table

# Of the page's drawings: for a wide window, and for a phone.
WIDE, NARROW = 920, 400
# Of a drawing: its margins, a line of a heading, the room below an axis and between panels.
_LEFT, _RIGHT, _LINE, _FOOT, _GAP = 52, 16, 16, 40, 24
# Of a letter of a heading, wider than most; between labels; letters of a run's name.
_LETTER, _LEAST_GAP, _LONGEST_NAME = 7, 26, 24
# Share of a column that its bar fills.
_BAR = 0.72

# Of the page and its drawings. Every value is escaped.
TEMPLATES = Environment(
    loader=PackageLoader("cfsp.result.page", "assets"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.globals |= {"LEFT": _LEFT, "RIGHT": _RIGHT, "LINE": _LINE, "BAR": _BAR}
TEMPLATES.globals |= {"WIDE": WIDE, "NARROW": NARROW}
TEMPLATES.filters["px"] = lambda pixels: f"{pixels:.2f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class Scale:
    """A linear map from values to the share of an axis."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """Return where a value lies; a `ValueError` where that is outside, as of NaN."""
        share = (value - self.low) / (self.high - self.low)
        if not -1e-6 <= share <= 1 + 1e-6:
            raise ValueError(f"{value} is no number from {self.low:g} to {self.high:g}")
        return share

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values within the scale."""
        step = _round_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def round_scale(values: Sequence[float]) -> Scale:
    """Return a scale from a round value below the lowest to one above the highest."""
    lowest, highest = min(values), max(values)
    step = _round_step(max(highest - lowest, abs(highest) * 0.02, 1e-9) / 4)
    low = math.floor(lowest / step + 1e-9) * step
    high = math.ceil(highest / step - 1e-9) * step
    return Scale(low, high if high > low else low + step)


def _round_step(least: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= least * 0.999)


class Mark(NamedTuple):
    """What stands for one block or model: the words about it, and values, each with its class."""

    say: str
    at: float | None = None  # share of the axis; None for a column of its own, side by side
    dots: Sequence[tuple[str, float]] = ()
    bars: Sequence[tuple[str, float]] = ()  # from the axis
    stick: tuple[float, float] | None = None  # a line between two values
    is_crossed: bool = False  # its last dot
    columns: int = 1  # that it speaks for, up to its own: a line at the last dot goes over them


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str  # as long as it likes
    height: int  # from the highest value to the lowest
    scale: Scale
    marks: Sequence[Mark]
    ticks: Sequence[float] | None = None  # None for some round values
    curve: Sequence[tuple[float, float]] = ()  # shares of the axis and values that a line joins
    labels: Sequence[tuple[float, str]] = ()  # below, by shares of the axis, as many as have room
    axis: str = "block"

    def y(self, value: float) -> float:
        """Return where a value lies."""
        return self.height * (1 - self.scale(value))

    @property
    def grid(self) -> list[tuple[float, str]]:
        """The values of the horizontal lines, and what stands beside them."""
        if self.ticks is None:
            return [(value, f"{value:g}") for value in self.scale.ticks(4)]
        return [(value, f"{value:,.0f}") for value in self.ticks]

    def fitting_labels(self, span: float) -> Sequence[tuple[float, str]]:
        """Return every label, or every second, fifth, ... as has room on an axis."""
        room = span / len(self.labels)
        least = max(_LEAST_GAP, _LETTER * max(len(label) for _, label in self.labels))
        steps = (n for n in (1, 2, 5, 10, 20, 50) if n * room >= least)
        return self.labels[:: next(steps, len(self.labels))]


@dataclass(frozen=True)
class Chart:
    """A chart."""

    key: str  # for anchors
    title: str
    caption: str  # what it shows and how to read it
    label: str  # what is seen, for those who do not see it
    panels: Sequence[Panel]  # to stand under each other
    table: Table  # the same values as text
    legend: Sequence[tuple[str, str]] = ()  # the class of a swatch, and what it means

    def draw(self, width: int) -> Markup:
        """Return the drawing, an SVG image."""
        return Markup(TEMPLATES.get_template("chart.svg").render(chart=self, width=width).strip())

    def placed(self, width: int) -> tuple[list[tuple[Panel, int, list[str]]], int]:
        """Return where each panel begins in a drawing, the lines of its heading; and the height."""
        panels, top = [], 0
        for panel in self.panels:
            lines = wrap(panel.title, int((width - _RIGHT - _LEFT) / _LETTER))
            panels.append((panel, top, lines))
            top += _LINE * len(lines) + 10 + panel.height + _FOOT * bool(panel.labels) + _GAP
        return panels, top - _GAP


def panel_title(title: str, run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """Return a panel's heading: with the run's name where there are several."""
    if len(runs) == 1:
        return title
    begin = title[0] if title[1].isupper() else title[0].lower()  # FFN, KV
    return f"{short_label(run.name)}: {begin}{title[1:]}"


def short_label(name: str) -> str:
    """Return the end of a long name, which tells paths apart better than the beginning."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"

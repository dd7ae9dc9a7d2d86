"""A chart as a value: its words, its panels, and the table behind them; drawn as SVG at any width.

Elements escape whatever is put into them. Colours come from classes (`assets/charts.css`), so that
one drawing serves light and dark pages. Lengths are in pixels of the drawing's own coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from markupsafe import Markup, escape

from cfsp.result.runs import RunFacts
from cfsp.result.tables import Table

# Of the page's drawings: for a wide window, and for a phone.
WIDE, NARROW = 920, 400
# Of a drawing: its margins, a line of a heading, the room below an axis and between panels.
_LEFT, _RIGHT, _LINE, _FOOT, _GAP = 52.0, 16.0, 16.0, 40.0, 24.0
# Of a letter of a heading, wider than most; between labels; letters of a run's name.
_LETTER, _LEAST_GAP, _LONGEST_NAME = 7.0, 26.0, 24
# Share of a column that its bar fills.
_BAR = 0.72

Value = str | float | int | None


def element(tag: str, *children: str, **attributes: Value) -> Markup:
    """Return an element. Children that are not markup are escaped, as are attributes.

    Of these `class_` is class, other underscores are hyphens, and None leaves one out.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    written = "".join(
        f' {names[name]}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{tag}{written}>{inner}</{tag}>")


def _text(value: Value) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


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


def scale_from_zero(highest: float) -> Scale:
    """Return a scale from zero to a round value above the highest."""
    highest = highest if highest > 0 else 1.0
    step = _round_step(highest / 4)
    return Scale(0.0, math.ceil(highest / step - 1e-9) * step)


def round_scale(values: Sequence[float]) -> Scale:
    """Return a scale from a round value below the lowest to one above the highest.

    It need not begin at zero: for curves, whose height is not a quantity.
    """
    lowest, highest = min(values), max(values)
    step = _round_step(max(highest - lowest, abs(highest) * 0.02, 1e-9) / 4)
    low = math.floor(lowest / step + 1e-9) * step
    high = math.ceil(highest / step - 1e-9) * step
    return Scale(low, high if high > low else low + step)


def _round_step(least: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= least * 0.999)


@dataclass(frozen=True)
class Mark:
    """What stands for one block or model: the words about it, and values, each with its class."""

    say: str
    at: float | None = None  # share of the axis; None for a column of its own, side by side
    dots: Sequence[tuple[str, float]] = ()
    bars: Sequence[tuple[str, float]] = ()  # from the axis
    stick: tuple[float, float] | None = None  # a line between two values
    cross: float | None = None
    columns: int = 1  # that it speaks for, up to its own: a line at the last dot goes over them

    def draw(self, index: int, x: float, room: float, height: Callable[[float], float]) -> Markup:
        """Return its drawing at `x`, in a column of some room, or in none; `height` is in pixels.

        Invisible behind it is what catches the pointer and shows which one is selected.
        """
        radius = 5.0 if not room else 4.0 if room > 14 else 3.0
        if room:
            place = {"x": x - room / 2, "y": -6, "width": room, "height": height(0.0) + 6}
            parts = [element("rect", class_="hit", **place)]
        else:
            y = height(self.dots[0][1])
            parts = [element("circle", class_="hit", cx=x, cy=y, r=3 * radius)]
        for class_, value in self.bars:
            width, y = _BAR * room, height(value)
            place = {"x": x - width / 2, "y": y, "width": width, "height": height(0.0) - y}
            parts.append(element("rect", class_=class_, **place, rx=1.5))
        lines = []
        if self.columns != 1:
            if not 1 <= self.columns <= index + 1:
                raise ValueError(f"a mark speaks for {self.columns} of {index + 1} columns")
            y = height(self.dots[-1][1])
            lines.append((x - (self.columns - 1) * room, x, y, y))
        if self.stick is not None:
            lines.append((x, x, height(self.stick[0]), height(self.stick[1])))
        parts += [
            element("line", class_="stick", x1=x1, x2=x2, y1=y1, y2=y2) for x1, x2, y1, y2 in lines
        ]
        parts += [
            element("circle", class_=class_, cx=x, cy=height(value), r=radius)
            for class_, value in self.dots
        ]
        if self.cross is not None:
            low, high, top, bottom = (
                at + sign * (radius + 1.5) for at in (x, height(self.cross)) for sign in (-1, 1)
            )
            strokes = _path([(low, top), (high, bottom)]) + _path([(low, bottom), (high, top)])
            parts.append(element("path", class_="rejected", d=strokes))
        return element("g", *parts, class_="mark", data_index=index, data_say=self.say)


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str  # as long as it likes
    height: float  # from the highest value to the lowest
    scale: Scale
    marks: Sequence[Mark]
    ticks: Sequence[float] | None = None  # None for some round values
    curve: Sequence[tuple[float, float]] = ()  # shares of the axis and values that a line joins
    labels: Sequence[tuple[float, str]] = ()  # below, by shares of the axis, as many as have room
    axis: str = "block"

    def draw(self, width: int) -> tuple[Markup, float]:
        """Return it in a drawing of this width, and its height with heading and axis."""
        right = width - _RIGHT
        span, room = right - _LEFT, (right - _LEFT) / len(self.marks)

        def height(value: float) -> float:
            return self.height * (1 - self.scale(value))

        lines = wrap(self.title, int(span / _LETTER))
        heading = [
            element("text", line, class_="panel", x=_LEFT, y=_LINE * number - 2)
            for number, line in enumerate(lines, start=1)
        ]
        parts = []
        for value in self.scale.ticks(4) if self.ticks is None else self.ticks:
            y = height(value)
            parts.append(element("line", class_="grid", x1=_LEFT, x2=right, y1=y, y2=y))
            label = f"{value:g}" if self.ticks is None else f"{value:,.0f}"
            parts.append(element("text", label, class_="tick end", x=_LEFT - 8, y=y + 4))
        if self.curve:
            line = _path([(_LEFT + at * span, height(value)) for at, value in self.curve])
            parts.append(element("path", class_="curve", d=line))
        for index, mark in enumerate(self.marks):
            if mark.at is None:
                parts.append(mark.draw(index, _LEFT + (index + 0.5) * room, room, height))
            else:
                parts.append(mark.draw(index, _LEFT + mark.at * span, 0.0, height))
        if self.labels:
            y = self.height
            parts.append(element("line", class_="axis", x1=_LEFT, x2=right, y1=y, y2=y))
            parts += [
                element("text", label, class_="tick middle", x=_LEFT + at * span, y=y + 16)
                for at, label in self._fitting(span)
            ]
            parts.append(element("text", self.axis, class_="tick end", x=right, y=y + 32))
        top = _LINE * len(lines) + 10
        inner = element("g", *parts, transform=f"translate(0 {top:g})")
        return Markup("").join([*heading, inner]), top + self.height + _FOOT * bool(self.labels)

    def _fitting(self, span: float) -> Sequence[tuple[float, str]]:
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

    @property
    def drawings(self) -> list[Markup]:
        """The drawings of the page: for a wide window and for a phone."""
        return [self.draw(WIDE), self.draw(NARROW)]

    def draw(self, width: int) -> Markup:
        """Return the drawing, an SVG image."""
        parts, top = [], 0.0
        for panel in self.panels:
            drawn, height = panel.draw(width)
            parts.append(element("g", drawn, transform=f"translate(0 {top:g})"))
            top += height + _GAP
        return element(
            "svg",
            *parts,
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {top - _GAP:g}",
            role="img",
            aria_label=self.label,
            class_="wide" if width >= WIDE else "narrow",
        )


def panel_title(title: str, run: RunFacts, runs: Sequence[RunFacts]) -> str:
    """Return a panel's heading: with the run's name where there are several."""
    if len(runs) == 1:
        return title
    begin = title[0] if title[1].isupper() else title[0].lower()  # FFN, KV
    return f"{short_label(run.name)}: {begin}{title[1:]}"


def short_label(name: str) -> str:
    """Return the end of a long name, which tells paths apart better than the beginning."""
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"

"""Drawing: SVG elements that escape whatever is put into them, scales, and axes.

Colours come from classes (`assets/charts.css`), so that one drawing serves light and dark pages.
Lengths are in pixels of the drawing's own coordinate system.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

Value = str | float | int | None
# Pixels between labels of columns, and the characters of a label.
_LEAST_GAP = 26.0
_LONGEST_LABEL = 24


def element(tag: str, *children: str, **attributes: Value) -> Markup:
    """Return an element. Children that are not markup are escaped, as are attributes.

    Args:
        tag: its name.
        *children: markup or plain text.
        **attributes: `class_` is class, other underscores are hyphens; None leaves one out.
    """
    names = {name: name.rstrip("_").replace("_", "-") for name in attributes}
    written = "".join(
        f' {names[name]}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = "".join(str(escape(child)) for child in children)
    return Markup(f"<{tag}{written}>{inner}</{tag}>")


def join(parts: Iterable[Markup]) -> Markup:
    """Return markup one after the other."""
    return Markup("").join(parts)


def path(points: Sequence[tuple[float, float]]) -> str:
    """Return the `d` of a path through points."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(value: Value) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Return about `count` round values within the scale."""
        step = _round_step((self.high - self.low) / max(1, count))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]


def scale_from_zero(highest: float, start: float, end: float) -> Scale:
    """Return a scale from zero to a round value above the highest."""
    highest = highest if highest > 0 else 1.0
    step = _round_step(highest / 4)
    return Scale(0.0, math.ceil(highest / step - 1e-9) * step, start, end)


def round_scale(lowest: float, highest: float, start: float, end: float) -> Scale:
    """Return a scale from a round value below the lowest to one above the highest.

    It need not begin at zero: for curves, whose height is not a quantity.
    """
    step = _round_step(max(highest - lowest, abs(highest) * 0.02, 1e-9) / 4)
    low = math.floor(lowest / step + 1e-9) * step
    high = math.ceil(highest / step - 1e-9) * step
    return Scale(low, high if high > low else low + step, start, end)


def _round_step(least: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= least * 0.999)


@dataclass(frozen=True)
class Bands:
    """Equal columns, one for each block, or for each FFN where blocks have several.

    Attributes:
        count: how many.
        start: left edge of the first.
        end: right edge of the last.
        blocks: the block of each column; None where columns are blocks.
    """

    count: int
    start: float
    end: float
    blocks: Sequence[int] | None = None

    @property
    def width(self) -> float:
        """Width of a column with its gap."""
        return (self.end - self.start) / self.count

    def left(self, index: int) -> float:
        """Return the left edge of a column."""
        return self.start + index * self.width

    def middle(self, index: int) -> float:
        """Return the middle of a column."""
        return self.left(index) + self.width / 2

    def labelled(self) -> list[int]:
        """Return the columns that have room for a label."""
        every = next(
            (n for n in (1, 2, 5, 10, 20, 50) if n * self.width >= _LEAST_GAP), self.count
        )  # fmt: skip
        return list(range(0, self.count, every))


def value_axis(scale: Scale, left: float, right: float, labels: dict[float, str]) -> Markup:
    """Return grid lines and labels for values on the vertical axis."""
    lines = []
    for value, label in labels.items():
        y = scale(value)
        lines.append(element("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        lines.append(element("text", label, class_="tick end", x=left - 8, y=y + 4))
    return join(lines)


def block_axis(bands: Bands, y: float) -> Markup:
    """Return the numbers of the blocks below a chart."""
    numbers = [
        element("text", str(name), class_="tick middle", x=bands.middle(i), y=y + 16)
        for i in bands.labelled()
        for name in [i if bands.blocks is None else bands.blocks[i]]
    ]
    line = element("line", class_="axis", x1=bands.start, x2=bands.end, y1=y, y2=y)
    name = element("text", "block", class_="tick end", x=bands.end, y=y + 32)
    return join([line, *numbers, name])


def short_label(name: str) -> str:
    """Return the end of a long name, which tells paths apart better than the beginning."""
    return name if len(name) <= _LONGEST_LABEL else f"…{name[1 - _LONGEST_LABEL :]}"


def panel_title(text: str, x: float, y: float) -> Markup:
    """Return the heading of one panel."""
    return element("text", text, class_="panel", x=x, y=y)


def hit_area(bands: Bands, index: int, top: float, bottom: float) -> Markup:
    """Return the invisible column that catches the pointer and shows what is selected."""
    return element(
        "rect",
        class_="hit",
        x=bands.left(index),
        y=top,
        width=bands.width,
        height=bottom - top,
    )


def mark(say: str, index: int, *parts: Markup) -> Markup:
    """Return what stands for one block (or point), with the words to say about it."""
    return element("g", *parts, class_="mark", data_index=index, data_say=say)


def shift(x: float, y_before: float, y_after: float, radius: float) -> Markup:
    """Return an open circle where a value was and a filled one where it is, joined by a line."""
    return join(
        [
            element("line", class_="stick", x1=x, x2=x, y1=y_before, y2=y_after),
            element("circle", class_="before", cx=x, cy=y_before, r=radius),
            element("circle", class_="after", cx=x, cy=y_after, r=radius),
        ]
    )


def cross(x: float, y: float, reach: float) -> Markup:
    """Return two crossing lines, the mark of what was rejected."""
    left, right, top, bottom = x - reach, x + reach, y - reach, y + reach
    strokes = path([(left, top), (right, bottom)]) + path([(left, bottom), (right, top)])
    return element("path", class_="rejected", d=strokes)


def drawing(width: float, height: float, label: str, *parts: Markup) -> Markup:
    """Return an SVG image with its alternative text."""
    return element(
        "svg",
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {_text(width)} {_text(height)}",
        role="img",
        aria_label=label,
        class_="wide" if width >= WIDE else "narrow",
    )


WIDE = 920
NARROW = 400

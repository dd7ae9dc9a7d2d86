"""SVG elements that escape whatever is put into them, and scales.

Colours come from classes (`assets/charts.css`), so that one drawing serves light and dark pages.
Lengths are in pixels of the drawing's own coordinate system.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

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


def join(parts: Iterable[Markup]) -> Markup:
    """Return markup one after the other."""
    return Markup("").join(parts)


def path(points: Sequence[tuple[float, float]]) -> str:
    """Return the `d` of a path through points."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def mark(say: str, index: int, *parts: Markup) -> Markup:
    """Return what stands for one block or point, with the words to say about it."""
    return element("g", *parts, class_="mark", data_index=index, data_say=say)


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


def round_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Return a scale from a round value below the lowest to one above the highest.

    It need not begin at zero: for curves, whose height is not a quantity.
    """
    lowest, highest = min(values), max(values)
    step = _round_step(max(highest - lowest, abs(highest) * 0.02, 1e-9) / 4)
    low = math.floor(lowest / step + 1e-9) * step
    high = math.ceil(highest / step - 1e-9) * step
    return Scale(low, high if high > low else low + step, start, end)


def _round_step(least: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(least))
    return next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= least * 0.999)

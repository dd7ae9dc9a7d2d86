"""A chart as a value: its words, its panels, the table behind them; `assets/chart.svg` draws it.

And charts of points on two axes: quality against size and speed, and the course of recovery.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from textwrap import wrap
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cfsp.result.facts import NOTHING, PARAMETERS, QUALITY, SPEED
from cfsp.result.names import short_names
from cfsp.result.runs import RunFacts, any_of, side_by_side
from cfsp.result.tables import Table, pareto_front

WIDE, NARROW = 920, 400  # of the page's drawings: for a wide window, and for a phone
# Of a drawing: its margins, a line of a heading, the room below an axis and between panels.
_LEFT, _RIGHT, _LINE, _FOOT, _GAP = 52, 16, 16, 40, 24
# Of a letter of a heading, wider than most; between labels; letters of a run's name.
_LETTER, _LEAST_GAP, _LONGEST_NAME = 7, 26, 24
_BAR = 0.72  # share of a column that its bar fills
_HEIGHT = 220
_COLOURS = 8  # of charts.css
_ORIGINAL, _STEP = "the original", "step"

# Of each model its name, where it lies, and its perplexity there.
Dots = dict[str, tuple[float, float]]

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


def pareto_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return perplexity against parameters and against speed; None for fewer than two runs."""
    swatches: dict[str, str] = {}
    if len(runs) <= _COLOURS:
        swatches = {run.name: f"run-{number}" for number, run in enumerate(runs, start=1)}
        swatches[_ORIGINAL] = "before"
    panels, rows = [], []
    for title, axis, sign, dots in _planes(runs):
        best = pareto_front([(sign * across, perplexity) for across, perplexity in dots.values()])
        on_front = dict(zip(dots, best, strict=True))  # the line joins these
        points = []
        for name in sorted(dots, key=lambda name: dots[name][0]):
            (across, perplexity), is_best = dots[name], on_front[name]
            say = f"{name}: {across:.4g} {axis}, perplexity {perplexity:.2f}"
            say += ", on the front" if is_best else ""
            swatch = swatches.get(name, "kept" if is_best else "gone")
            points.append((across, perplexity, swatch, say, is_best))
            value = [f"{across:.4g}", f"{perplexity:.2f}", "yes" if is_best else NOTHING]
            rows.append([f"{title}, {name}", *value])
        panels.append(_panel(title, axis, points))
    if not panels:
        return None
    return Chart(
        "pareto",
        "Quality against size and speed",
        "Lower is better. The line joins the models that no other beats in both: the choice is "
        "among them.",
        "Points, one for each model: perplexity against size, and against speed where it was "
        "measured. A line joins those that no other model beats in both.",
        panels,
        Table(["panel, model", "horizontal", "perplexity", "on the front"], rows),
        [(swatch, name) for name, swatch in swatches.items()]
        or [("kept", "on the front"), ("gone", "beaten")],
    )


def _planes(runs: Sequence[RunFacts]) -> Iterator[tuple[str, str, int, Dots]]:
    """Yield title, axis, sign (-1 where more is better) and two models or more of a panel."""
    every = side_by_side(runs, QUALITY)
    sizes = {run.name: fact for run in runs for fact in run.facts if fact.name == PARAMETERS}
    texts = [any_of(facts).text for facts in every]
    names, titles = short_names(texts), []
    for facts, text in zip(every, texts, strict=True):
        dots = {
            name: (100 * size.after.value / size.before.value, fact.after.value)
            for name, fact in facts.items()
            if (size := sizes.get(name)) and size.before and size.after and fact.after
        }
        # The text, with all else where that alone is not clear.
        how = f", {any_of(facts).conditions}" if texts.count(text) > 1 else ""
        titles.append(f"Perplexity on {short_label(names[text])}{how}")
        if len(dots) > 1:
            dense = [fact.before.value for fact in facts.values() if fact.before is not None]
            original = {_ORIGINAL: (100.0, dense[0])} if dense else {}
            yield titles[-1], "% of parameters", 1, {**dots, **original}
    speeds = sorted(side_by_side(runs, SPEED), key=lambda facts: any_of(facts).name)
    for (facts, title), speed in product(zip(every, titles, strict=True), speeds):
        dots = {
            name: (timed.ratio, fact.after.value)
            for name, timed in speed.items()
            if timed.ratio is not None and (fact := facts.get(name)) and fact.after
        }
        if len(dots) > 1:
            yield f"{title}, {any_of(speed).name}", "times the original's speed", -1, dots


def _panel(
    title: str, axis: str, points: Sequence[tuple[float, float, str, str, bool]], *also: float
) -> Panel:
    """Return a panel of points: place, class, words, and whether the line goes through."""
    across = round_scale([*also, *(point[0] for point in points)])
    scale = round_scale([point[1] for point in points])
    marks = [Mark(say, across(x), dots=[(class_, y)]) for x, y, class_, say, _ in points]
    curve = [(across(x), y) for x, y, _, _, is_joined in points if is_joined]
    labels = [
        (across(value), f"{value:,g}")
        for value in across.ticks(8)
        if axis != _STEP or value == int(value)
    ]
    return Panel(title, _HEIGHT, scale, marks, None, curve, labels, axis)


def recovery_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how the loss on held-out text fell in recovery; None where no run was recovered."""
    recovered = [run for run in runs if run.recovery_history]
    if not recovered:
        return None
    panels, rows = [], []
    for run in recovered:
        points = []
        for entry in run.recovery_history:
            step, held_out = f"{entry['step']:.0f}", f"{entry['held_out']:.4f}"
            loss = f"{entry['loss']:.4f}" if "loss" in entry else NOTHING
            say = f"Step {step}: held-out loss {held_out}, training loss {loss}"
            points.append((entry["step"], entry["held_out"], "dot", say, True))
            rows.append([f"{run.name}, {step}", held_out, loss])
        title = panel_title("Loss on held-out text, nats", run, runs)
        panels.append(_panel(title, _STEP, points, 0.0))
    return Chart(
        "recovery",
        "How recovery went",
        "The loss is that of training, on text that was held out: the divergence from the dense "
        "model where that teaches. The weights of the best evaluation were kept.",
        "A falling line of points: loss on held-out text at each evaluation during recovery.",
        panels,
        Table(["run, step", "held-out loss", "training loss"], rows),
    )

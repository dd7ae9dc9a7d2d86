"""Charts of points on two axes: quality against size and speed, and the course of recovery."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from cfsp.result.facts import NOTHING, SPEED
from cfsp.result.page.chart import LEFT, RIGHT, Chart, Legend, Panel, panel_title, short_label
from cfsp.result.page.svg import element, join, mark, path, round_scale
from cfsp.result.runs import RunFacts, measured_conditions, perplexity_of_original
from cfsp.result.tables import Table, pareto_front

_HEIGHT, _RADIUS = 220.0, 5.0
# Of charts.css.
_COLOURS = 8
_ORIGINAL, _STEP = "the original", "step"


@dataclass(frozen=True)
class _Point:
    """A named value, the words about it, whether the line goes through, and its colour's class."""

    name: str
    x: float
    y: float
    say: str
    is_joined: bool = True
    swatch: str = "dot"


@dataclass(frozen=True)
class _Plane:
    """What one panel shows, points from left to right, on an axis that reaches to `start`."""

    title: str
    axis: str
    points: Sequence[_Point]
    start: float

    def panel(self, width: int) -> Panel:
        """Return the panel in a drawing of this width."""
        reach = [self.start, *(point.x for point in self.points)]
        across = round_scale(reach, LEFT, width - RIGHT)
        scale = round_scale([point.y for point in self.points], _HEIGHT, 0.0)
        line = [(across(point.x), scale(point.y)) for point in self.points if point.is_joined]
        marks = [element("path", class_="curve", d=path(line))]
        for index, point in enumerate(self.points):
            circles = [
                element("circle", class_=class_, cx=across(point.x), cy=scale(point.y), r=radius)
                for class_, radius in (("hit", 3 * _RADIUS), (point.swatch, _RADIUS))
            ]
            marks.append(mark(point.say, index, *circles))
        ticks = {
            across(value): f"{value:,g}"
            for value in across.ticks(5 if width < 600 else 8)
            if self.axis != _STEP or value == int(value)
        }
        return Panel(self.title, _HEIGHT, scale, join(marks), ticks, self.axis)


def pareto_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return perplexity against parameters and against speed; None for fewer than two runs.

    There is a panel for each text on which two runs or more were measured in the same way, and one
    for each speed of theirs that was measured.
    """
    swatches: dict[str, str] = {}
    if len(runs) <= _COLOURS:
        swatches = {run.name: f"run-{number}" for number, run in enumerate(runs, start=1)}
        swatches[_ORIGINAL] = "before"
    planes = list(_planes(runs, swatches))
    if not planes:
        return None
    rows = [
        [f"{plane.title}, {point.name}", f"{point.x:.4g}", f"{point.y:.2f}",
         "yes" if point.is_joined else NOTHING]
        for plane in planes
        for point in plane.points
    ]  # fmt: skip
    return Chart(
        "pareto",
        "Quality against size and speed",
        "Lower is better. The line joins the models that no other beats in both: the choice is "
        "among them.",
        "Points, one for each model: perplexity against size, and against speed where it was "
        "measured. A line joins those that no other model beats in both.",
        lambda width: [plane.panel(width) for plane in planes],
        Table(["panel, model", "horizontal", "perplexity", "on the front"], rows),
        [Legend(swatch, name) for name, swatch in swatches.items()]
        or [Legend("kept", "on the front"), Legend("gone", "beaten")],
    )


def _planes(runs: Sequence[RunFacts], swatches: Mapping[str, str]) -> Iterator[_Plane]:
    """Yield the planes by size, then those by speed, that two runs or more are on."""
    every = measured_conditions(runs)
    texts = [each.text for each in every]
    # The text, with all else where that alone is not clear.
    titles = {
        each: f"Perplexity on {short_label(each.text)}"
        + (f", {each}" if texts.count(each.text) > 1 else "")
        for each in every
    }
    for conditions, title in titles.items():
        dots = {
            run.name: (100 * m["parameters_after"] / m["parameters_before"], value)
            for run in runs
            if "parameters_before" in (m := run.manifest)
            and (value := run.perplexity(conditions)) is not None
        }
        if len(dots) > 1:
            if (dense := perplexity_of_original(runs, conditions)) is not None:
                dots[_ORIGINAL] = 100.0, dense
            yield _ranked(title, "% of parameters", dots, swatches)
    phases = sorted({fact.name for run in runs for fact in run.under(SPEED)})
    for (conditions, title), phase in product(titles.items(), phases):
        dots = {
            run.name: (fact.ratio, value)
            for run in runs
            for fact in run.under(SPEED)
            if fact.name == phase
            and fact.ratio is not None
            and (value := run.perplexity(conditions)) is not None
        }
        if len(dots) > 1:
            axis = "times the original's speed"
            yield _ranked(f"{title}, {phase}", axis, dots, swatches, sign=-1)


def _ranked(
    title: str,
    axis: str,
    dots: Mapping[str, tuple[float, float]],
    swatches: Mapping[str, str],
    sign: int = 1,
) -> _Plane:
    """Return the plane of models, whose line joins the best; `sign` is -1 where more is better.

    Without swatches, colours by name, they show which are best.
    """
    front = pareto_front([(sign * across, perplexity) for across, perplexity in dots.values()])
    points = [
        _Point(
            name,
            across,
            perplexity,
            f"{name}: {across:.4g} {axis}, perplexity {perplexity:.2f}"
            + (", on the front" if best else ""),
            best,
            swatches.get(name, "kept" if best else "gone"),
        )
        for (name, (across, perplexity)), best in zip(dots.items(), front, strict=True)
    ]
    points.sort(key=lambda point: point.x)
    return _Plane(title, axis, points, points[0].x)


def recovery_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how the loss on held-out text fell in recovery; None where no run was recovered."""
    recovered = [run for run in runs if run.recovery_history]
    if not recovered:
        return None
    planes, rows = [], []
    for run in recovered:
        points = []
        for entry in run.recovery_history:
            step, held_out = f"{entry['step']:.0f}", f"{entry['held_out']:.4f}"
            loss = f"{entry['loss']:.4f}" if "loss" in entry else NOTHING
            say = f"Step {step}: held-out loss {held_out}, training loss {loss}"
            points.append(_Point(run.name, entry["step"], entry["held_out"], say))
            rows.append([f"{run.name}, {step}", held_out, loss])
        title = panel_title("Loss on held-out text, nats", run, runs)
        planes.append(_Plane(title, _STEP, points, 0.0))
    return Chart(
        "recovery",
        "How recovery went",
        "The loss is that of training, on text that was held out: the divergence from the dense "
        "model where that teaches. The weights of the best evaluation were kept.",
        "A falling line of points: loss on held-out text at each evaluation during recovery.",
        lambda width: [plane.panel(width) for plane in planes],
        Table(["run, step", "held-out loss", "training loss"], rows),
    )

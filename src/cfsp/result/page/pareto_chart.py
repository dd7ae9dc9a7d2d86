"""Quality against size: which runs are not beaten by a smaller or a better one.

One panel for each text on which two runs or more were measured in the same way; a second axis of
the same kind for measured speed, where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cfsp.result.conditions import Conditions
from cfsp.result.front import pareto_front
from cfsp.result.page.chart import Chart, Legend, Table
from cfsp.result.page.drawing import (
    Scale,
    drawing,
    element,
    join,
    mark,
    panel_title,
    path,
    round_scale,
    short_label,
    value_axis,
)
from cfsp.result.runs import RunFacts
from cfsp.result.summary import NOTHING, measured_conditions, perplexity_of_original

_LEFT, _RIGHT, _TITLE, _HEIGHT, _FOOT, _GAP = 52.0, 20.0, 26.0, 240.0, 40.0, 20.0
_RADIUS = 5.0
# Of charts.css.
_COLOURS = 8
_ORIGINAL = "the original"


@dataclass(frozen=True)
class _Dot:
    """One model: its share of the original's parameters, in percent, or its speed."""

    name: str
    across: float
    perplexity: float


@dataclass(frozen=True)
class _Plane:
    """What one panel shows; less across is better, or more if `more_is_better`."""

    title: str
    axis: str
    dots: Sequence[_Dot]
    more_is_better: bool = False

    @property
    def front(self) -> list[bool]:
        sign = -1 if self.more_is_better else 1
        return pareto_front([(sign * dot.across, dot.perplexity) for dot in self.dots])


def pareto_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return perplexity against parameters and against speed; None for fewer than two runs."""
    planes = [*_by_size(runs), *_by_speed(runs)]
    if not planes:
        return None

    def draw(width: int) -> Markup:
        step = _TITLE + _HEIGHT + _FOOT + _GAP
        parts = [
            element(
                "g", _panel(plane, width, swatches), transform=f"translate(0 {number * step:g})"
            )
            for number, plane in enumerate(planes)
        ]
        return drawing(
            width,
            len(planes) * step - _GAP,
            "Points, one for each model: perplexity against size, and against speed where it was "
            "measured. A line joins those that no other model beats in both.",
            *parts,
        )

    swatches = _swatches(runs)
    rows = [
        [f"{plane.title}, {dot.name}", f"{dot.across:.4g}", f"{dot.perplexity:.2f}", _word(best)]
        for plane in planes
        for dot, best in zip(plane.dots, plane.front, strict=True)
    ]
    return Chart(
        "pareto",
        "Quality against size and speed",
        "Lower is better. The line joins the models that no other beats in both: the choice is "
        "among them.",
        draw,
        Table(["panel, model", "horizontal", "perplexity", "on the front"], rows),
        [Legend(swatch, name) for name, swatch in swatches.items()]
        or [Legend("kept", "on the front"), Legend("gone", "beaten")],
    )


def _swatches(runs: Sequence[RunFacts]) -> dict[str, str]:
    """Return the colour of each model by its name; none for more runs than there are colours."""
    if len(runs) > _COLOURS:
        return {}
    own = {run.name: f"run-{number}" for number, run in enumerate(runs, start=1)}
    return own | {_ORIGINAL: "before"}


def _by_size(runs: Sequence[RunFacts]) -> list[_Plane]:
    planes = []
    for conditions, name in _titles(runs).items():
        measured = [run for run in runs if "after" in run.measured.perplexity.get(conditions, {})]
        measured = [run for run in measured if "parameters_before" in run.manifest]
        if len(measured) < 2:
            continue
        dots = [
            _Dot(
                run.name,
                100 * run.manifest["parameters_after"] / run.manifest["parameters_before"],
                run.measured.perplexity[conditions]["after"],
            )
            for run in measured
        ]
        if (dense := perplexity_of_original(runs, conditions)) is not None:
            dots.append(_Dot(_ORIGINAL, 100.0, dense))
        planes.append(_Plane(f"Perplexity on {name}", "% of parameters", dots))
    return planes


def _by_speed(runs: Sequence[RunFacts]) -> list[_Plane]:
    planes = []
    for conditions, name in _titles(runs).items():
        for phase in sorted({phase for run in runs for phase in run.measured.speed}):
            measured = [
                run
                for run in runs
                if "ratio" in run.measured.speed.get(phase, {})
                and "after" in run.measured.perplexity.get(conditions, {})
            ]
            if len(measured) < 2:
                continue
            dots = [
                _Dot(
                    run.name,
                    run.measured.speed[phase]["ratio"],
                    run.measured.perplexity[conditions]["after"],
                )
                for run in measured
            ]
            title = f"Perplexity on {name}, {phase}"
            planes.append(_Plane(title, "times the original's speed", dots, more_is_better=True))
    return planes


def _titles(runs: Sequence[RunFacts]) -> dict[Conditions, str]:
    """Return what panels call conditions: the text, with all else where that alone is not clear."""
    every = measured_conditions(runs)
    texts = [each.text for each in every]
    return {
        each: short_label(each.text) + (f", {each}" if texts.count(each.text) > 1 else "")
        for each in every
    }


def _word(on_front: bool) -> str:
    return "yes" if on_front else NOTHING


def _panel(plane: _Plane, width: int, swatches: Mapping[str, str]) -> Markup:
    bottom, right = _TITLE + _HEIGHT, width - _RIGHT
    across = _scale([dot.across for dot in plane.dots], _LEFT, right)
    values = [dot.perplexity for dot in plane.dots]
    scale = round_scale(min(values), max(values), bottom, _TITLE)
    order = sorted(zip(plane.dots, plane.front, strict=True), key=lambda pair: pair[0].across)
    front = [(across(dot.across), scale(dot.perplexity)) for dot, best in order if best]
    marks = [
        mark(
            f"{dot.name}: {dot.across:.4g} {plane.axis}, perplexity {dot.perplexity:.2f}"
            + (", on the front" if best else ""),
            index,
            element(
                "circle",
                class_="hit",
                cx=across(dot.across),
                cy=scale(dot.perplexity),
                r=3 * _RADIUS,
            ),
            element(
                "circle",
                class_=swatches.get(dot.name, "kept" if best else "gone"),
                cx=across(dot.across),
                cy=scale(dot.perplexity),
                r=_RADIUS,
            ),
        )
        for index, (dot, best) in enumerate(order)
    ]
    ticks = [
        element("text", f"{value:g}", class_="tick middle", x=across(value), y=bottom + 16)
        for value in across.ticks(5 if width < 600 else 8)
    ]
    return join(
        [
            panel_title(plane.title, _LEFT, 14),
            value_axis(scale, _LEFT, right, {value: f"{value:g}" for value in scale.ticks(4)}),
            element("path", class_="curve", d=path(front)),
            *marks,
            *ticks,
            element("text", plane.axis, class_="tick end", x=right, y=bottom + 32),
        ]
    )


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    return round_scale(min(values), max(values), start, end)

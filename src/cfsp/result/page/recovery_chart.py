"""The chart of recovery: held-out perplexity and training loss over steps."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cfsp.result.page.chart import Chart, Table
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
from cfsp.result.summary import NOTHING

_LEFT, _RIGHT, _TITLE, _HEIGHT, _FOOT, _GAP = 52.0, 16.0, 26.0, 200.0, 40.0, 36.0


def recovery_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how held-out perplexity fell while the runs were recovered."""
    recovered = [run for run in runs if run.recovery_history]
    if not recovered:
        return None

    def draw(width: int) -> Markup:
        parts = []
        for number, run in enumerate(recovered):
            title = "Perplexity on held-out text"
            title = (
                title if len(runs) == 1 else f"{short_label(run.name)}: perplexity on held-out text"
            )
            panel = _panel(title, run.recovery_history, width)
            top = number * (_TITLE + _HEIGHT + _GAP)
            parts.append(element("g", panel, transform=f"translate(0 {top:g})"))
        height = len(recovered) * (_TITLE + _HEIGHT + _GAP) - _GAP + _FOOT
        return drawing(
            width,
            height,
            "A falling line of points: perplexity on held-out text at each evaluation during "
            "recovery.",
            *parts,
        )

    rows = [
        [
            f"{run.name}, {entry['step']:.0f}",
            f"{entry['perplexity']:.2f}",
            f"{entry['loss']:.4f}" if "loss" in entry else NOTHING,
        ]
        for run in recovered
        for entry in run.recovery_history
    ]
    return Chart(
        "recovery",
        "How recovery went",
        "Perplexity is on a part of the training text that was held out. The weights of the best "
        "evaluation were kept.",
        draw,
        Table(["run, step", "perplexity", "training loss"], rows),
    )


def _panel(title: str, history: Sequence[dict[str, float]], width: int) -> Markup:
    bottom, right = _TITLE + _HEIGHT, width - _RIGHT
    last = max(entry["step"] for entry in history)
    across = Scale(0.0, float(last) or 1.0, _LEFT, right)
    values = [entry["perplexity"] for entry in history]
    scale = round_scale(min(values), max(values), bottom, _TITLE)
    points = [(across(entry["step"]), scale(entry["perplexity"])) for entry in history]
    marks = []
    for i, (entry, (x, y)) in enumerate(zip(history, points, strict=True)):
        left = (points[i - 1][0] + x) / 2 if i else x - 8
        until = (points[i + 1][0] + x) / 2 if i + 1 < len(points) else x + 8
        hit = element(
            "rect", class_="hit", x=left, y=_TITLE, width=max(until - left, 1.0), height=_HEIGHT
        )
        say = f"Step {entry['step']:.0f}: perplexity {entry['perplexity']:.2f}"
        if "loss" in entry:
            say += f", training loss {entry['loss']:.3f}"
        marks.append(mark(say, i, hit, element("circle", class_="dot", cx=x, cy=y, r=4)))
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    steps = [
        element("text", f"{value:,.0f}", class_="tick middle", x=across(value), y=bottom + 16)
        for value in across.ticks(6)
        if value == int(value)
    ]
    return join(
        [
            panel_title(title, _LEFT, 14),
            value_axis(scale, _LEFT, right, labels),
            element("path", class_="curve", d=path(points)),
            *marks,
            *steps,
            element("text", "step", class_="tick end", x=right, y=bottom + 32),
        ]
    )

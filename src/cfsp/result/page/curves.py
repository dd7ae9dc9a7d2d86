"""Charts of points on two axes: quality against size and speed, and the course of recovery."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from cfsp.result.facts import NOTHING, PARAMETERS, QUALITY, SPEED
from cfsp.result.names import short_names
from cfsp.result.page.chart import Chart, Mark, Panel, panel_title, round_scale, short_label
from cfsp.result.runs import RunFacts, any_of, side_by_side
from cfsp.result.tables import Table, pareto_front

_HEIGHT = 220
# Of charts.css.
_COLOURS = 8
_ORIGINAL, _STEP = "the original", "step"

# Of each model its name, where it lies, and its perplexity there.
Dots = dict[str, tuple[float, float]]


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

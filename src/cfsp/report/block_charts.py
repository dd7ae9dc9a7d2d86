"""Charts with one column for each block: the method, the channels' strengths, the repair.

Several runs of one model stand under each other and share the horizontal axis.
Shapes: L blocks, N bins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from cfsp.pruning_plan import PruningPlan
from cfsp.report.channels import BlockChannels, Distribution, distribution, energy_removed
from cfsp.report.chart import Chart, Legend, Table
from cfsp.report.drawing import (
    Bands,
    Scale,
    block_axis,
    drawing,
    element,
    hit_area,
    join,
    mark,
    panel_title,
    path,
    scale_from_zero,
    value_axis,
)
from cfsp.report.run_facts import RunFacts
from cfsp.report.summary import NOTHING

_LEFT, _RIGHT, _TITLE, _FOOT, _GAP = 52.0, 6.0, 26.0, 40.0, 30.0
_BAR = 0.72
# Half the breadth of a single channel, so that it can be seen.
_LEAST_REACH = 0.7


@dataclass(frozen=True)
class Column:
    """One block of one panel: what is drawn in it, and what is said about it."""

    say: str
    parts: Markup


def method_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return the picture of the method: how far blocks move, and what they keep."""
    planned = [(run, run.plan) for run in runs if run.plan is not None]
    if not planned:
        return None
    count = len(planned[0][1].blocks)

    def draw(width: int) -> Markup:
        bands = Bands(count, _LEFT, width - _RIGHT)
        panels = [_distance_panel([plan for _, plan in planned], bands)]
        panels += [
            _width_panel(_panel_name("Channels that stay", run, runs), plan, bands)
            for run, plan in planned
        ]
        return _stack(
            width,
            bands,
            panels,
            "Two rows of columns, one column for each block. Above: how far the block turns the "
            "hidden state. Below: how many of its FFN channels stay, within the full width.",
        )

    several = len(planned) > 1
    head = ["block"]
    for run, _ in planned:
        prefix = f"{run.name}: " if several else ""
        head += [f"{prefix}{noun}" for noun in ("distance", "importance", "before", "kept")]
    rows = [
        [
            str(i),
            *(
                cell
                for _, plan in planned
                for cell in (
                    f"{plan.blocks[i].distance:.4f}",
                    f"{plan.blocks[i].importance:.3f}",
                    f"{plan.blocks[i].width:,}",
                    f"{len(plan.blocks[i].kept):,}",
                )
            ),
        ]
        for i in range(count)
    ]
    return Chart(
        "blocks",
        "What each block does, and what it keeps",
        "A block that turns the hidden state further is worth more, and keeps more of its "
        "channels. Distance is the mean angle between a block's input and output, in half turns.",
        draw,
        Table(head, rows),
        [Legend("kept", "kept"), Legend("gone", "removed")],
    )


def strength_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how strong the channels of every block are, and where the cut runs."""
    measured = [
        (run, distribution(run.statistics, run.plan))
        for run in runs
        if run.statistics is not None and run.plan is not None
    ]
    if not measured:
        return None
    count = len(measured[0][1].blocks)

    def draw(width: int) -> Markup:
        bands = Bands(count, _LEFT, width - _RIGHT)
        panels = [
            _strength_panel(_panel_name("Root mean square activation", run, runs), shape, bands)
            for run, shape in measured
        ]
        return _stack(
            width,
            bands,
            panels,
            "One upright shape for each block: its breadth at a height is the number of channels "
            "with that root mean square activation. The part that stays is coloured.",
        )

    several = len(measured) > 1
    head = ["block"]
    for run, _ in measured:
        prefix = f"{run.name}: " if several else ""
        head += [
            f"{prefix}{noun}" for noun in ("median", "strongest", "weakest kept", "energy removed")
        ]
    rows = [
        [
            str(i),
            *(
                cell
                for _, shape in measured
                for cell in (
                    _short(shape.blocks[i].median),
                    _short(shape.blocks[i].strongest),
                    _short(shape.blocks[i].cut),
                    f"{shape.blocks[i].energy_removed:.2%}",
                )
            ),
        ]
        for i in range(count)
    ]
    return Chart(
        "strengths",
        "How strong the channels are, and where the cut runs",
        "The breadth of a shape is the number of channels of that strength, on a logarithmic "
        "scale; the few beyond an end of the scale count at that end. Where channels were chosen "
        "by activation alone, the cut is a level line.",
        draw,
        Table(head, rows),
        [Legend("kept", "kept"), Legend("gone", "removed")],
    )


def restoration_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return the error of every block's FFN before and after repair."""
    restored = [run for run in runs if run.restored_blocks]
    if not restored:
        return None
    count = len(restored[0].restored_blocks)
    predictions = [_predicted_L(run) for run in restored]
    highest = max(
        max(float(block["error_before"]) for run in restored for block in run.restored_blocks),
        max((value for each in predictions for value in each), default=0.0),
    )

    def draw(width: int) -> Markup:
        bands = Bands(count, _LEFT, width - _RIGHT)
        panels = [
            _error_panel(
                _panel_name("Relative squared error of the FFN's output", run, runs),
                run,
                predicted,
                highest,
                bands,
            )
            for run, predicted in zip(restored, predictions, strict=True)
        ]
        return _stack(
            width,
            bands,
            panels,
            "For each block an open circle, the error after pruning alone, and a filled one, the "
            "error after repair, joined by a line.",
        )

    several = len(restored) > 1
    head = ["block"]
    for run in restored:
        prefix = f"{run.name}: " if several else ""
        head += [f"{prefix}{noun}" for noun in ("before", "after", "energy removed", "ridge")]
    rows = [
        [
            str(i),
            *(
                cell
                for run, predicted in zip(restored, predictions, strict=True)
                for cell in _error_cells(run.restored_blocks[i], predicted[i : i + 1])
            ),
        ]
        for i in range(count)
    ]
    legend = [Legend("before", "pruned"), Legend("after", "repaired")]
    if any(predictions):
        legend.append(Legend("predicted", "activation energy removed"))
    return Chart(
        "restoration",
        "What the repair won back, block by block",
        "Error is measured on calibration windows that were held out from the least-squares fit. "
        "The short line is the error that the statistics alone predict: the share of activation "
        "energy that was removed.",
        draw,
        Table(head, rows),
        legend,
    )


@dataclass(frozen=True)
class Panel:
    """A row of columns with a heading and a value axis."""

    title: str
    height: float
    scale: Scale
    labels: dict[float, str]
    columns: Sequence[Column]


def _stack(width: int, bands: Bands, panels: Sequence[Panel], label: str) -> Markup:
    """Return panels under each other; scales are relative to each panel's own top."""
    parts: list[Markup] = []
    top = 0.0
    for panel in panels:
        bottom = _TITLE + panel.height
        inner = [
            panel_title(panel.title, _LEFT, 14),
            value_axis(panel.scale, _LEFT, bands.end, panel.labels),
            join(
                mark(column.say, i, hit_area(bands, i, _TITLE - 6, bottom), column.parts)
                for i, column in enumerate(panel.columns)
            ),
        ]
        parts.append(element("g", *inner, transform=f"translate(0 {top:g})"))
        top += bottom + _GAP
    height = top - _GAP
    return drawing(width, height + _FOOT, label, *parts, block_axis(bands, height))


def _distance_panel(plans: Sequence[PruningPlan], bands: Bands) -> Panel:
    height = 110.0
    highest = max(block.distance for plan in plans for block in plan.blocks)
    scale = scale_from_zero(highest, _TITLE + height, _TITLE)
    columns = []
    for i in range(bands.count):
        x = bands.middle(i)
        y = scale(plans[0].blocks[i].distance)
        stick = element("line", class_="stick", x1=x, x2=x, y1=scale(0.0), y2=y)
        dots = [
            element("circle", class_="dot", cx=x, cy=scale(plan.blocks[i].distance), r=3.5)
            for plan in plans
        ]
        first = plans[0].blocks[i]
        say = f"Block {i}: distance {first.distance:.4f}, importance {first.importance:.3f}"
        columns.append(Column(say, join([stick, *dots])))
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    return Panel("Angular distance between input and output", height, scale, labels, columns)


def _width_panel(title: str, plan: PruningPlan, bands: Bands) -> Panel:
    height = 170.0
    highest = max(block.width for block in plan.blocks)
    scale = Scale(0.0, float(highest), _TITLE + height, _TITLE)
    columns = []
    for i, block in enumerate(plan.blocks):
        kept = len(block.kept)
        bar = bands.width * _BAR
        x = bands.middle(i) - bar / 2
        full = _column(x, scale(block.width), bar, scale(0.0), "gone")
        stays = _column(x, scale(kept), bar, scale(0.0), "kept")
        say = (
            f"Block {i}: keeps {kept:,} of {block.width:,} channels "
            f"({kept / block.width:.0%}), importance {block.importance:.3f}"
        )
        columns.append(Column(say, join([full, stays])))
    marks = [0.0, highest / 4, highest / 2, highest * 3 / 4, float(highest)]
    return Panel(title, height, scale, {value: f"{value:,.0f}" for value in marks}, columns)


def _strength_panel(title: str, shape: Distribution, bands: Bands) -> Panel:
    height = 260.0
    edges = shape.edges_N1
    scale = Scale(edges[0], edges[-1], _TITLE + height, _TITLE)
    columns = [
        Column(_strength_words(i, block), _violin(block, edges, scale, bands, i))
        for i, block in enumerate(shape.blocks)
    ]
    labels = {math.log10(value): f"{value:,.10g}" for value in _log_ticks(edges[0], edges[-1])}
    return Panel(title, height, scale, labels, columns)


def _violin(
    block: BlockChannels, edges: Sequence[float], scale: Scale, bands: Bands, index: int
) -> Markup:
    both = [kept + removed for kept, removed in zip(block.kept_N, block.removed_N, strict=True)]
    widest = max(both)
    x, half = bands.middle(index), bands.width * 0.46

    def outline(counts: Sequence[int]) -> str:
        right, left = [], []
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            reach = max(half * count / widest, _LEAST_REACH) if count else 0.0
            right += [(x + reach, scale(low)), (x + reach, scale(high))]
            left += [(x - reach, scale(low)), (x - reach, scale(high))]
        return path([*right, *reversed(left)], closed=True)

    return join(
        [
            element("path", class_="gone", d=outline(both)),
            element("path", class_="kept", d=outline(block.kept_N)),
        ]
    )


def _error_panel(
    title: str, run: RunFacts, predicted: Sequence[float], highest: float, bands: Bands
) -> Panel:
    height = 190.0
    scale = scale_from_zero(highest, _TITLE + height, _TITLE)
    radius = 4.0 if bands.width > 14 else 3.0
    columns = []
    for i, block in enumerate(run.restored_blocks):
        before, after = float(block["error_before"]), float(block["error_after"])
        x = bands.middle(i)
        parts = [
            element("line", class_="stick", x1=x, x2=x, y1=scale(before), y2=scale(after)),
            element("circle", class_="before", cx=x, cy=scale(before), r=radius),
            element("circle", class_="after", cx=x, cy=scale(after), r=radius),
        ]
        say = f"Block {i}: error {before:.4f}, repaired {after:.4f}"
        if block["ridge"] is None:
            say += ", left alone because repair did not help"
        if predicted:
            y, half = scale(predicted[i]), bands.width * 0.4
            parts.insert(
                0, element("line", class_="predicted", x1=x - half, x2=x + half, y1=y, y2=y)
            )
            say += f", activation energy removed {predicted[i]:.4f}"
        columns.append(Column(say, join(parts)))
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    return Panel(title, height, scale, labels, columns)


def _column(x: float, y: float, width: float, bottom: float, class_: str) -> Markup:
    return element("rect", class_=class_, x=x, y=y, width=width, height=bottom - y, rx=1.5)


def _strength_words(index: int, block: BlockChannels) -> str:
    return (
        f"Block {index}: median {_short(block.median)}, strongest {_short(block.strongest)}, "
        f"weakest kept {_short(block.cut)}, {block.energy_removed:.2%} of the activation "
        "energy removed"
    )


def _error_cells(block: dict[str, float | None], predicted: Sequence[float]) -> list[str]:
    ridge = block["ridge"]
    return [
        f"{block['error_before']:.6f}",
        f"{block['error_after']:.6f}",
        f"{predicted[0]:.6f}" if predicted else NOTHING,
        "left alone" if ridge is None else f"{ridge:g}",
    ]


def _predicted_L(run: RunFacts) -> list[float]:
    if run.statistics is None or run.plan is None:
        return []
    pairs = zip(run.statistics.blocks, run.plan.blocks, strict=True)
    return [energy_removed(statistics, block.kept) for statistics, block in pairs]


def _panel_name(title: str, run: RunFacts, runs: Sequence[RunFacts]) -> str:
    return title if len(runs) == 1 else f"{run.name}: {title[0].lower()}{title[1:]}"


def _short(value: float) -> str:
    return f"{value:.3g}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round values between two powers of ten: finer steps where the range is short."""
    digits = (1.0, 2.0, 5.0) if high - low < 3 else (1.0,)
    tens = range(math.floor(low), math.ceil(high) + 1)
    values = [digit * 10.0**power for power in tens for digit in digits]
    return [value for value in values if low <= math.log10(value) <= high]

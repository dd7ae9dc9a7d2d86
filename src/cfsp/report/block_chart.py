"""What each block does and what it keeps: its distance, and its width before and after.

Several runs of one model stand under each other and share the horizontal axis.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cfsp.planning.plan_file import PruningPlan
from cfsp.report.chart import (
    TITLE,
    Chart,
    Column,
    Legend,
    Panel,
    block_bands,
    block_table,
    panel_name,
    stack_panels,
)
from cfsp.report.drawing import Bands, Scale, element, join, scale_from_zero
from cfsp.report.runs import RunFacts

_BAR = 0.72


def block_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how far blocks turn the hidden state, and how many channels they keep."""
    planned = [(run, run.plan) for run in runs if run.plan is not None]
    if not planned:
        return None
    count = len(planned[0][1].blocks)

    def draw(width: int) -> Markup:
        bands = block_bands(count, width)
        panels = [_distance_panel([plan for _, plan in planned], bands)]
        panels += [
            width_panel(
                panel_name("Channels that stay", run, runs),
                [block.width for block in plan.blocks],
                plan.kept_widths,
                bands,
            )
            for run, plan in planned
        ]
        return stack_panels(
            width,
            bands,
            panels,
            "Two rows of columns, one column for each block. Above: how far the block turns the "
            "hidden state. Below: how many of its FFN channels stay, within the full width.",
        )

    def cells(run: int, index: int) -> list[str]:
        block = planned[run][1].blocks[index]
        return [
            f"{block.distance:.4f}",
            f"{block.importance:.3f}",
            f"{block.width:,}",
            f"{block.kept_width:,}",
        ]

    nouns = ("distance", "importance", "before", "kept")
    return Chart(
        "blocks",
        "What each block does, and what it keeps",
        "A block that turns the hidden state further is worth more, and keeps more of its "
        "channels. Distance is the mean angle between a block's input and output, in half turns.",
        draw,
        block_table([run for run, _ in planned], nouns, count, cells),
        [Legend("kept", "kept"), Legend("gone", "removed")],
    )


def _distance_panel(plans: Sequence[PruningPlan], bands: Bands) -> Panel:
    height = 110.0
    highest = max(block.distance for plan in plans for block in plan.blocks)
    scale = scale_from_zero(highest, TITLE + height, TITLE)
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


def width_panel(title: str, before_L: Sequence[int], after_L: Sequence[int], bands: Bands) -> Panel:
    """Return a panel of the channels that blocks keep, within those that they had."""
    height = 170.0
    highest = max(before_L)
    scale = Scale(0.0, float(highest), TITLE + height, TITLE)
    columns = []
    for i, (before, after) in enumerate(zip(before_L, after_L, strict=True)):
        bar = bands.width * _BAR
        x = bands.middle(i) - bar / 2
        full = _column(x, scale(before), bar, scale(0.0), "gone")
        stays = _column(x, scale(after), bar, scale(0.0), "kept")
        say = f"Block {i}: keeps {after:,} of {before:,} channels ({after / before:.0%})"
        columns.append(Column(say, join([full, stays])))
    marks = [0.0, highest / 4, highest / 2, highest * 3 / 4, float(highest)]
    return Panel(title, height, scale, {value: f"{value:,.0f}" for value in marks}, columns)


def _column(x: float, y: float, width: float, bottom: float, class_: str) -> Markup:
    return element("rect", class_=class_, x=x, y=y, width=width, height=bottom - y, rx=1.5)

"""What each block does and what it keeps: its distance, and its width before and after.

Several runs of one model stand under each other and share the horizontal axis. A column is a block,
or one of its FFN units where blocks have several.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.unit_plan import UnitPlan
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
from cfsp.report.summary import NOTHING
from cfsp.settings import Part

_BAR = 0.72


_CAPTIONS: dict[Part, tuple[str, str, str]] = {
    "ffn": (
        "What each block does, and what it keeps",
        "A block that turns the hidden state further is worth more, and keeps more of its "
        "channels. Distance is the mean angle between a block's input and output, in half turns.",
        "FFN channels",
    ),
    "kv": (
        "What each attention does, and what it keeps",
        "The same of attentions. Distance is between the hidden states before and after the "
        "attention where these are seen, else between the block's input and output.",
        "KV groups",
    ),
}


def block_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how far blocks turn the hidden state, and how many channels they keep."""
    return _chart_of(runs, "ffn")


def attention_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how far attentions turn it, and how many KV groups they keep."""
    return _chart_of(runs, "kv")


def _chart_of(runs: Sequence[RunFacts], part: Part) -> Chart | None:
    plans = [(run, run.plan.only(part)) for run in runs if run.plan is not None]
    planned = [(run, plan) for run, plan in plans if plan.units]
    if not planned:
        return None
    title, caption, noun = _CAPTIONS[part]
    columns = [columns_of(plan) for _, plan in planned]
    names = column_names(planned[0][1])

    def draw(width: int) -> Markup:
        bands = block_bands(len(names), width, blocks_of_columns(planned[0][1]))
        panels = [_distance_panel(columns, names, bands)]
        panels += [
            width_panel(
                panel_name(
                    "Channels that stay" if part == "ffn" else "KV groups that stay", run, runs
                ),
                [0 if unit is None else unit.width for unit in units],
                # Experts that go whole take their channels along.
                [0 if unit is None else round(unit.width * unit.kept_share) for unit in units],
                bands,
                names,
            )
            for (run, _), units in zip(planned, columns, strict=True)
        ]
        return stack_panels(
            width,
            bands,
            panels,
            "Two rows of columns, one column for each block. Above: how far the block turns the "
            f"hidden state. Below: how many of its {noun} stay, within the full width; none of "
            "what was removed whole.",
        )

    def cells(run: int, index: int) -> list[str]:
        unit = columns[run][index]
        if unit is None:
            return [NOTHING] * len(nouns)
        return [
            f"{unit.distance:.4f}",
            f"{unit.importance:.3f}",
            f"{unit.width:,}",
            unit.kept_in_words,
        ]

    nouns = ("distance", "importance", "before", "kept")
    return Chart(
        "blocks" if part == "ffn" else "attentions",
        title,
        caption,
        draw,
        block_table([run for run, _ in planned], nouns, names, cells),
        [Legend("kept", "kept"), Legend("gone", "removed")],
    )


def blocks_of_columns(plan: PruningPlan) -> list[int] | None:
    """Return the block of each column of a chart; None where columns are blocks."""
    blocks = [unit.block for unit in plan.units]
    return blocks if len(set(blocks)) < len(blocks) else None


def columns_of(plan: PruningPlan) -> list[UnitPlan | None]:
    """Return the FFN unit of each column of a chart; None of a block that has none."""
    if blocks_of_columns(plan) is not None:
        return list(plan.units)
    unit_of = {unit.block: unit for unit in plan.units}
    return [unit_of.get(block) for block in range(plan.units[-1].block + 1)]


def column_names(plan: PruningPlan) -> list[str]:
    """Return what each column of a chart is called."""
    return [str(i) if unit is None else unit.name for i, unit in enumerate(columns_of(plan))]


def _distance_panel(
    columns: Sequence[Sequence[UnitPlan | None]], names: Sequence[str], bands: Bands
) -> Panel:
    height = 110.0
    highest = max(unit.distance for units in columns for unit in units if unit is not None)
    scale = scale_from_zero(highest, TITLE + height, TITLE)
    drawn = []
    for i, units in enumerate(zip(*columns, strict=True)):
        first = units[0]
        if first is None:
            drawn.append(Column(f"Block {i}: no FFN", Markup("")))
            continue
        x = bands.middle(i)
        y = scale(first.distance)
        stick = element("line", class_="stick", x1=x, x2=x, y1=scale(0.0), y2=y)
        dots = [
            element("circle", class_="dot", cx=x, cy=scale(unit.distance), r=3.5)
            for unit in units
            if unit is not None
        ]
        say = f"Block {names[i]}: distance {first.distance:.4f}, importance {first.importance:.3f}"
        drawn.append(Column(say, join([stick, *dots])))
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    return Panel("Angular distance between input and output", height, scale, labels, drawn)


def width_panel(
    title: str,
    before_U: Sequence[int],
    after_U: Sequence[int],
    bands: Bands,
    names: Sequence[str] | None,
) -> Panel:
    """Return a panel of the channels that FFNs keep, within those that they had.

    Args:
        title: of the panel.
        before_U: channels of each column before; 0 where there is no FFN.
        after_U: channels that stay.
        bands: the columns.
        names: of the columns; None for their numbers.
    """
    height = 170.0
    highest = max(before_U)
    scale = Scale(0.0, float(highest), TITLE + height, TITLE)
    columns = []
    for i, (before, after) in enumerate(zip(before_U, after_U, strict=True)):
        name = str(i) if names is None else names[i]
        if not before:
            columns.append(Column(f"Block {name}: no FFN", Markup("")))
            continue
        bar = bands.width * _BAR
        x = bands.middle(i) - bar / 2
        full = _column(x, scale(before), bar, scale(0.0), "gone")
        stays = _column(x, scale(after), bar, scale(0.0), "kept")
        say = f"Block {name}: keeps {after:,} of {before:,} channels ({after / before:.0%})"
        if not after:  # a unit keeps some, unless it goes whole
            say = f"Block {name}: removed"
        columns.append(Column(say, join([full, stays])))
    marks = [0.0, highest / 4, highest / 2, highest * 3 / 4, float(highest)]
    return Panel(title, height, scale, {value: f"{value:,.0f}" for value in marks}, columns)


def _column(x: float, y: float, width: float, bottom: float, class_: str) -> Markup:
    return element("rect", class_=class_, x=x, y=y, width=width, height=bottom - y, rx=1.5)

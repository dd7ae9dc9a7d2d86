"""What each block does and what it keeps: its distance, and its width before and after.

Several runs of one model stand under each other and share the horizontal axis. A column is a block,
or one of its FFN units where blocks have several.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.result.page.chart import (
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
from cfsp.result.page.drawing import Bands, Scale, element, join, scale_from_zero
from cfsp.result.runs import RunFacts
from cfsp.result.summary import NOTHING
from cfsp.settings import SENSITIVITY_METRICS, UNIFORM, Part, removal_in_words, worth_in_words

_BAR = 0.72


# What has the units of a part, what these are, and between what distances are.
_NOUNS: dict[Part, tuple[str, str, str]] = {
    "ffn": ("block", "FFN channels", "a block's input and output"),
    "kv": (
        "attention",
        "KV groups",
        "the hidden states before and after the attention where these are seen, else between the "
        "block's input and output",
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
    thing, noun, between = _NOUNS[part]
    metrics = {plan.criterion["block_metric"] for _, plan in planned if _narrows(plan)}
    follows_distance = metrics.isdisjoint(SENSITIVITY_METRICS)
    scale = "Importance is relative to the largest."
    if follows_distance:
        scale = f"Distance is the mean angle between {between}, in half turns."
        if not metrics <= {"angular", UNIFORM}:
            scale = f"Distance is between {between}, on the scale of the mean angle, in half turns."
    columns = [_columns_of(plan) for _, plan in planned]
    names = _column_names(planned[0][1])

    def draw(width: int) -> Markup:
        bands = block_bands(len(names), width, _blocks_of_columns(planned[0][1]))
        panels = [_worth_panel(columns, names, bands, follows_distance=follows_distance)]
        panels += [
            _width_panel(
                panel_name(f"{noun} that stay", run, runs),
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
            "Two rows of columns, one column for each block. Above: how "
            f"{'far the block turns the hidden state' if follows_distance else 'much it counts'}. "
            f"Below: how many of its {noun} stay, within the full width; none of "
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
        f"What each {thing} does, and what it keeps",
        f"{_what_counts(planned, part)} {scale}",
        draw,
        block_table([run for run, _ in planned], nouns, names, cells),
        [Legend("kept", "kept"), Legend("gone", "removed")],
    )


def _narrows(plan: PruningPlan) -> bool:
    """Return whether units that stay lose channels."""
    return any(unit.kept_width < unit.width for unit in plan.kept_units if unit.kept)


def _what_counts(planned: Sequence[tuple[RunFacts, PruningPlan]], part: Part) -> str:
    """Say by what each run's plan chose what goes of a part, once what is the same of several."""
    thing, noun, _ = _NOUNS[part]
    runs_of: dict[str, list[str]] = {}
    for run, plan in planned:
        words = [f"No {noun} go from what stays."]
        if _narrows(plan):
            words = [worth_in_words(plan.criterion["block_metric"], f"{thing.title()}s", noun)]
        if plan.removed_blocks if part == "ffn" else plan.removed_attentions:
            chosen = removal_in_words(plan.criterion.get("removal", ""))
            words.append(f"The {thing}s that the model lost are those {chosen}.")
        runs_of.setdefault(" ".join(words), []).append(run.name)
    if len(runs_of) == 1:
        return next(iter(runs_of))
    return " ".join(f"{', '.join(names)}: {words}" for words, names in runs_of.items())


def _blocks_of_columns(plan: PruningPlan) -> list[int] | None:
    """Return the block of each column of a chart; None where columns are blocks."""
    blocks = [unit.block for unit in plan.units]
    return blocks if len(set(blocks)) < len(blocks) else None


def _columns_of(plan: PruningPlan) -> list[UnitPlan | None]:
    """Return the FFN unit of each column of a chart; None of a block that has none."""
    if _blocks_of_columns(plan) is not None:
        return list(plan.units)
    unit_of = {unit.block: unit for unit in plan.units}
    return [unit_of.get(block) for block in range(plan.units[-1].block + 1)]


def _column_names(plan: PruningPlan) -> list[str]:
    """Return what each column of a chart is called."""
    return [str(i) if unit is None else unit.name for i, unit in enumerate(_columns_of(plan))]


def _worth_panel(
    columns: Sequence[Sequence[UnitPlan | None]],
    names: Sequence[str],
    bands: Bands,
    *,
    follows_distance: bool,
) -> Panel:
    """Return a panel of the distances that plans follow, or of the importances."""

    def worth(unit: UnitPlan) -> float:
        return unit.distance if follows_distance else unit.importance

    height = 110.0
    highest = max(worth(unit) for units in columns for unit in units if unit is not None)
    scale = scale_from_zero(highest, TITLE + height, TITLE)
    drawn = []
    for i, units in enumerate(zip(*columns, strict=True)):
        first = units[0]
        if first is None:
            drawn.append(Column(f"Block {i}: no FFN", Markup("")))
            continue
        x = bands.middle(i)
        y = scale(worth(first))
        stick = element("line", class_="stick", x1=x, x2=x, y1=scale(0.0), y2=y)
        dots = [
            element("circle", class_="dot", cx=x, cy=scale(worth(unit)), r=3.5)
            for unit in units
            if unit is not None
        ]
        say = f"Block {names[i]}: distance {first.distance:.4f}, importance {first.importance:.3f}"
        drawn.append(Column(say, join([stick, *dots])))
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    title = "Distance between input and output" if follows_distance else "Importance"
    return Panel(title, height, scale, labels, drawn)


def _width_panel(
    title: str,
    before_U: Sequence[int],
    after_U: Sequence[int],
    bands: Bands,
    names: Sequence[str],
) -> Panel:
    """Return a panel of the channels that FFNs keep, within those that they had.

    Args:
        title: of the panel.
        before_U: channels of each column before; 0 where there is no FFN.
        after_U: channels that stay.
        bands: the columns.
        names: of the columns.
    """
    height = 170.0
    highest = max(before_U)
    scale = Scale(0.0, float(highest), TITLE + height, TITLE)
    columns = []
    for i, (name, before, after) in enumerate(zip(names, before_U, after_U, strict=True)):
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

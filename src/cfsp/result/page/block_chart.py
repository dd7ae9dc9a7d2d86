"""What each block does and what it keeps: its distance, and its width before and after.

Several runs of one model stand under each other and share the horizontal axis. A column is a block,
or one of its FFN units where blocks have several.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.result.facts import NOTHING, unit_rows
from cfsp.result.page.chart import (
    Chart,
    Columns,
    Draw,
    Legend,
    block_table,
    by_block,
    nothing,
    panel_title,
)
from cfsp.result.page.svg import Scale, element, join, scale_from_zero
from cfsp.result.runs import RunFacts
from cfsp.settings import SENSITIVITY, Part, removal_in_words, worth_in_words

_WORTH_HEIGHT, _WIDTH_HEIGHT, _BAR = 110.0, 170.0, 0.72
# What has the units of a part, what these are, and between what distances are.
_NOUNS: dict[Part, tuple[str, str, str]] = {
    "ffn": ("block", "FFN channels", "a block's input and output"),
    "kv": (
        "attention layer",
        "KV groups",
        "the hidden states before and after the attention where these are seen, else between the "
        "block's input and output",
    ),
}
_HEAD = ("distance", "importance", "before", "kept")


def block_chart(runs: Sequence[RunFacts], part: Part = "ffn") -> Chart | None:
    """Return how far blocks, or attention layers, turn the hidden state, and what they keep.

    The runs are of one model; None where none has a plan with units of the part.
    """
    plans = [(run, run.plan.only(part)) for run in runs if run.plan is not None]
    planned = [(run, plan) for run, plan in plans if plan.units]
    if not planned:
        return None
    thing, noun, between = _NOUNS[part]
    metrics = {plan.criterion["block_metric"] for _, plan in planned if _narrows(plan)}
    by_distance = SENSITIVITY not in metrics
    scale = "Importance is relative to the largest."
    if by_distance:
        scale = f"Distance is the mean angle between {between}, in half turns."
    columns = [columns_of(plan) for _, plan in planned]
    names = [str(i) if unit is None else unit.name for i, unit in enumerate(columns[0])]
    below = [str(i) if unit is None else str(unit.block) for i, unit in enumerate(columns[0])]
    panels = [
        _worth_panel(columns, names, by_distance),
        *(
            _width_panel(panel_title(f"{noun} that stay", run, runs), names, units)
            for (run, _), units in zip(planned, columns, strict=True)
        ),
    ]
    heads = [
        [f"{run.name}: {name}" if len(planned) > 1 else name for name in _HEAD]
        for run, _ in planned
    ]
    cells = [
        [[NOTHING] * len(_HEAD) if unit is None else unit_rows([unit])[0][1:] for unit in units]
        for units in columns
    ]
    return Chart(
        "blocks" if part == "ffn" else "attentions",
        f"What each {thing} does, and what it keeps",
        f"{_what_counts(planned, part)} {scale}",
        "Two rows of columns, one column for each block. Above: how "
        f"{'far the block turns the hidden state' if by_distance else 'much it counts'}. "
        f"Below: how many of its {noun} stay, within the full width; none of what was removed "
        "whole.",
        by_block(panels, below),
        block_table(heads, names, cells),
        [Legend("kept", "kept"), Legend("gone", "removed")],
    )


def columns_of(plan: PruningPlan) -> list[UnitPlan | None]:
    """Return the unit of each column: all of them where a block has several, else of each block.

    None stands for a block that has none.
    """
    unit_of = {unit.block: unit for unit in plan.units}
    if len(unit_of) < len(plan.units):
        return list(plan.units)
    return [unit_of.get(block) for block in range(plan.units[-1].block + 1)]


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
            things = f"{thing.capitalize()}s"
            words = [worth_in_words(plan.criterion["block_metric"], things, noun)]
        if plan.removed_blocks if part == "ffn" else plan.removed_attentions:
            chosen = removal_in_words(plan.criterion.get("removal", ""))
            words.append(f"The {thing}s that the model lost are those {chosen}.")
        runs_of.setdefault(" ".join(words), []).append(run.name)
    if len(runs_of) == 1:
        return next(iter(runs_of))
    return " ".join(f"{', '.join(names)}: {words}" for words, names in runs_of.items())


def _columns(
    names: Sequence[str],
    units: Sequence[UnitPlan | None],
    column: Callable[[int, UnitPlan], tuple[str, Draw]],
) -> list[tuple[str, Draw]]:
    """Return the words and the drawing of each column; without a unit there is nothing drawn."""
    found = []
    for i, (name, unit) in enumerate(zip(names, units, strict=True)):
        say, draw = ("no FFN", nothing) if unit is None else column(i, unit)
        found.append((f"Block {name}: {say}", draw))
    return found


def _worth_panel(
    columns: Sequence[Sequence[UnitPlan | None]], names: Sequence[str], by_distance: bool
) -> Columns:
    """Return a panel of the distances that plans follow, or of the importances."""

    def worth(unit: UnitPlan) -> float:
        return unit.distance if by_distance else unit.importance

    highest = max(worth(unit) for units in columns for unit in units if unit is not None)
    scale = scale_from_zero(highest, _WORTH_HEIGHT, 0.0)

    def column(i: int, first: UnitPlan) -> tuple[str, Draw]:
        worths = [worth(unit) for units in columns if (unit := units[i]) is not None]

        def draw(x: float, _: float) -> Markup:
            top = scale(worth(first))
            stick = element("line", class_="stick", x1=x, x2=x, y1=scale(0.0), y2=top)
            dots = [element("circle", class_="dot", cx=x, cy=scale(y), r=3.5) for y in worths]
            return join([stick, *dots])

        return f"distance {first.distance:.4f}, importance {first.importance:.3f}", draw

    title = "Distance between input and output" if by_distance else "Importance"
    return Columns(title, scale, _columns(names, columns[0], column))


def _width_panel(title: str, names: Sequence[str], units: Sequence[UnitPlan | None]) -> Columns:
    """Return a panel of the channels that units keep, within those that they had."""
    highest = float(max(unit.width for unit in units if unit is not None))
    scale = Scale(0.0, highest, _WIDTH_HEIGHT, 0.0)

    def column(_: int, unit: UnitPlan) -> tuple[str, Draw]:
        # Experts that go whole take their channels along.
        after = round(unit.width * unit.kept_share)

        def bar(class_: str, channels: int, x: float, room: float) -> Markup:
            width, y = _BAR * room, scale(channels)
            place = {"x": x - width / 2, "y": y, "width": width, "height": scale(0.0) - y}
            return element("rect", class_=class_, **place, rx=1.5)

        def draw(x: float, room: float) -> Markup:
            return bar("gone", unit.width, x, room) + bar("kept", after, x, room)

        if not after:  # a unit keeps some, unless it goes whole
            return "removed", draw
        kept = f"keeps {after:,} of {unit.width:,} channels ({after / unit.width:.0%})"
        return kept, draw

    ticks = [highest * quarter / 4 for quarter in range(5)]
    return Columns(title, scale, _columns(names, units, column), ticks)

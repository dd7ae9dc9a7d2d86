"""The chart with a column for each block: what it does and keeps.

Several runs of one model stand under each other and share the horizontal axis. A column is a block,
or one of its FFN units where blocks have several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from cfsp.planning.importance import SCORE_IN_WORDS
from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.result.facts import NOTHING, unit_rows
from cfsp.result.page.chart import Chart, Mark, Panel, Scale, panel_title, round_scale
from cfsp.result.runs import RunFacts
from cfsp.result.tables import Table
from cfsp.settings import PART_NOUNS, SENSITIVITY, Part, removal_in_words, worth_in_words

_WORTH_HEIGHT, _HEIGHT = 110, 170
# The chart of a part, what has its units, and between what distances are.
_WORDS: dict[Part, tuple[str, str, str]] = {
    "ffn": ("blocks", "block", "a block's input and output"),
    "kv": (
        "attentions",
        "attention layer",
        "the hidden states before and after the attention where these are seen, else between the "
        "block's input and output",
    ),
}
_HEAD = ("distance", "importance", "before", "kept")


def block_chart(runs: Sequence[RunFacts], part: Part = "ffn") -> Chart | None:
    """Return what blocks, or attention layers, of one model do and keep; None without a plan."""
    plans = [(run, run.plan.only(part)) for run in runs if run.plan is not None]
    planned = [(run, plan) for run, plan in plans if plan.units]
    if not planned:
        return None
    which, thing, between = _WORDS[part]
    noun = PART_NOUNS[part]
    metrics = {plan.criterion["block_metric"] for _, plan in planned if plan.narrows}
    by_distance = SENSITIVITY not in metrics
    scale = "Importance is relative to the largest."
    if by_distance:
        scale = f"Distance is the mean angle between {between}, as a share of 180 degrees."
    columns = [_columns_of(plan) for _, plan in planned]
    names = [str(i) if unit is None else unit.name for i, unit in enumerate(columns[0])]
    blocks = [i if unit is None else unit.block for i, unit in enumerate(columns[0])]
    labels = [((i + 0.5) / len(blocks), str(block)) for i, block in enumerate(blocks)]
    titles = [panel_title(f"{noun} that stay", run, runs) for run, _ in planned]
    panels = [
        _worth_panel(columns, names, by_distance),
        *(_width_panel(title, names, its) for title, its in zip(titles, columns, strict=True)),
    ]
    heads = [
        [f"{run.name}: {name}" if len(planned) > 1 else name for name in _HEAD]
        for run, _ in planned
    ]
    nothing = (NOTHING,) * len(_HEAD)
    rows = [
        [name, *chain(*(unit_rows([unit])[0][1:] if unit else nothing for unit in units))]
        for name, *units in zip(names, *columns, strict=True)
    ]
    return Chart(
        which,
        f"What each {thing} does, and what it keeps",
        f"{_what_counts(planned, part)} {scale}",
        "Two rows of columns, one column for each block. Above: how "
        f"{'far the block turns the hidden state' if by_distance else 'much it counts'}. Below: "
        f"how many of its {noun} stay, within the full width; none of what was removed whole.",
        [*panels[:-1], replace(panels[-1], labels=labels)],
        Table(["block", *(name for head in heads for name in head)], rows),
        [("kept", "kept"), ("gone", "removed")],
    )


def _columns_of(plan: PruningPlan) -> list[UnitPlan | None]:
    """Return the unit of each column: of blocks with one at most, of each block that or None."""
    unit_of = {unit.block: unit for unit in plan.units}
    if len(unit_of) < len(plan.units):
        return list(plan.units)
    return [unit_of.get(block) for block in range(plan.units[-1].block + 1)]


def _what_counts(planned: Sequence[tuple[RunFacts, PruningPlan]], part: Part) -> str:
    """Say by what each run's plan chose what goes of a part, once what is the same of several."""
    thing, noun = _WORDS[part][1], PART_NOUNS[part]
    runs_of: dict[str, list[str]] = {}
    for run, plan in planned:
        words = [f"No {noun} go from what stays."]
        if plan.narrows:
            things = f"{thing.capitalize()}s"
            words = [worth_in_words(plan.criterion["block_metric"], things, noun)]
        if plan.kept_experts is not None:
            words.append(f"Experts stay by {SCORE_IN_WORDS}.")
        if not all(unit.kept for unit in plan.units):
            chosen = removal_in_words(plan.criterion.get("removal", ""))
            words.append(f"The {thing}s that the model lost are those {chosen}.")
        runs_of.setdefault(" ".join(words), []).append(run.name)
    if len(runs_of) == 1:
        return next(iter(runs_of))
    return " ".join(f"{', '.join(names)}: {words}" for words, names in runs_of.items())


def _worth_panel(
    columns: Sequence[Sequence[UnitPlan | None]], names: Sequence[str], by_distance: bool
) -> Panel:
    """Return a panel of the distances that plans follow, or of the importances."""
    marks = []
    for name, *units in zip(names, *columns, strict=True):
        first, say = units[0], "no FFN"
        worths = [unit.distance if by_distance else unit.importance for unit in units if unit]
        if first is not None:
            say = f"distance {first.distance:.4f}, importance {first.importance:.3f}"
        dots, stick = [("dot", worth) for worth in worths], (0.0, worths[0]) if worths else None
        marks.append(Mark(f"Block {name}: {say}", dots=dots, stick=stick))
    scale = round_scale([0.0, max(worth for mark in marks for _, worth in mark.dots) or 1.0])
    title = "Distance between input and output" if by_distance else "Importance"
    return Panel(title, _WORTH_HEIGHT, scale, marks)


def _width_panel(title: str, names: Sequence[str], units: Sequence[UnitPlan | None]) -> Panel:
    marks = []
    for name, unit in zip(names, units, strict=True):
        if unit is None:
            marks.append(Mark(f"Block {name}: no FFN"))
            continue
        # Experts that go whole take their channels along; a unit keeps some, unless it goes whole.
        after, kept = round(unit.width * unit.kept_share), "removed"
        if after:
            noun = "channels" if unit.part == "ffn" else PART_NOUNS[unit.part]
            kept = f"keeps {after:,} of {unit.width:,} {noun} ({after / unit.width:.0%})"
        if unit.loses_experts:
            kept = f"keeps {len(unit.kept_ffns)} of {unit.ffns} experts ({unit.kept_share:.0%})"
        bars = [("gone", unit.width), *([("kept", after)] if after else [])]
        marks.append(Mark(f"Block {name}: {kept}", bars=bars))
    highest = max(unit.width for unit in units if unit is not None)
    ticks = sorted({round(highest * quarter / 4) for quarter in range(5)})
    return Panel(title, _HEIGHT, Scale(0.0, highest), marks, ticks)

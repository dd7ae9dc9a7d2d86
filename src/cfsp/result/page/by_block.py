"""Charts with a column for each block: what it does and keeps, and what repair won back there.

Several runs of one model stand under each other and share the horizontal axis. A column is a block,
or one of its FFN units where blocks have several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.repair.result import entry_name, was_rejected
from cfsp.result.facts import NOTHING, unit_rows
from cfsp.result.making import Step
from cfsp.result.page.chart import Chart, Mark, Panel, Scale, panel_title, round_scale
from cfsp.result.runs import RunFacts
from cfsp.result.tables import Table
from cfsp.settings import SENSITIVITY, Part, removal_in_words, worth_in_words

Entry = dict[str, Any]

_WORTH_HEIGHT, _HEIGHT = 110, 170
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

# What the errors of a step of repair are errors of.
_ERRORS = {"ridge": "relative squared error of the output"}
_ERROR = "relative error of the hidden states after the block"
_REPAIR = (
    "Each step of repair is judged on windows that were held out from it; what did not help is "
    "rejected, and the block stays as it was. Errors of hidden states are relative to the dense "
    "model's and grow from block to block, because a block gets what the pruned blocks before it "
    "give."
)
_NOTHING_CUT = "nothing was cut"
_TOGETHER = (
    " Blocks that changed together share one error, measured after the last of them; a line goes "
    "over them."
)
_GREW = (
    " Where an error grew and yet the step was kept, it was judged by the model's predictions, "
    "which became better: so it is with the last blocks."
)


def block_chart(runs: Sequence[RunFacts], part: Part = "ffn") -> Chart | None:
    """Return what blocks, or attention layers, of one model do and keep; None without a plan."""
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
    columns = [_columns_of(plan) for _, plan in planned]
    names = [str(i) if unit is None else unit.name for i, unit in enumerate(columns[0])]
    below = [i if unit is None else unit.block for i, unit in enumerate(columns[0])]
    titles = [panel_title(f"{noun} that stay", run, runs) for run, _ in planned]
    panels = [
        _worth_panel(columns, names, by_distance),
        *(_width_panel(title, names, its) for title, its in zip(titles, columns, strict=True)),
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
        _under_each_other(panels, below),
        _table(heads, names, cells),
        [("kept", "kept"), ("gone", "removed")],
    )


def _under_each_other(panels: Sequence[Panel], below: Sequence[int]) -> list[Panel]:
    labels = [((i + 0.5) / len(below), str(block)) for i, block in enumerate(below)]
    return [*panels[:-1], replace(panels[-1], labels=labels)]


def _table(
    heads: Sequence[Sequence[str]], names: Sequence[str], cells: Sequence[Sequence[Sequence[str]]]
) -> Table:
    """Return the table behind a chart, from the heads and rows of each run or step."""
    return Table(
        ["block", *(name for head in heads for name in head)],
        [
            [name, *(cell for each in row for cell in each)]
            for name, row in zip(names, zip(*cells, strict=True), strict=True)
        ],
    )


def _columns_of(plan: PruningPlan) -> list[UnitPlan | None]:
    """Return the unit of each column: of blocks with one at most, of each block that or None."""
    unit_of = {unit.block: unit for unit in plan.units}
    if len(unit_of) < len(plan.units):
        return list(plan.units)
    return [unit_of.get(block) for block in range(plan.units[-1].block + 1)]


def _narrows(plan: PruningPlan) -> bool:
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
            kept = f"keeps {after:,} of {unit.width:,} channels ({after / unit.width:.0%})"
        bars = [("gone", unit.width), *([("kept", after)] if after else [])]
        marks.append(Mark(f"Block {name}: {kept}", bars=bars))
    highest = max(unit.width for unit in units if unit is not None)
    ticks = sorted({round(highest * quarter / 4) for quarter in range(5)})
    return Panel(title, _HEIGHT, Scale(0.0, highest), marks, ticks)


def repair_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return a panel for every step of every run; None if no run has errors of a step."""
    found = [(run, step) for run in runs for step in run.repair_steps if any(step["blocks"])]
    if not found:
        return None
    blocks = _blocks_of_units(found)
    count = len(blocks) if blocks else max(len(step["blocks"]) for _, step in found)
    shown = [(run, str(step["name"]), _in_columns(step, blocks, count)) for run, step in found]
    panels = []
    for run, name, columns in shown:
        # One scale for all runs; the error of rejected weights, of any size, is not drawn.
        entries = [each for _, other, its in shown if other == name for each in its if each]
        errors = [each["error_before"] for each in entries]
        errors += [each["error_after"] for each in entries if each["kept"]]
        scale = round_scale([0.0, max(map(float, errors)) or 1.0])
        marks = [_repair_mark(i, columns, name, blocks or range(count)) for i in range(count)]
        title = panel_title(f"{name.capitalize()}: {_ERRORS.get(name, _ERROR)}", run, runs)
        panels.append(Panel(title, _HEIGHT, scale, marks))
    entries = [entry for *_, columns in shown for entry in columns if entry is not None]
    legend = [("before", "before the step"), ("after", "after it")]
    if any(map(was_rejected, entries)):
        legend.append(("rejected", "rejected"))
    together = any(entry["blocks"] > 1 for entry in entries)
    grew = any(entry["kept"] and entry["error_after"] > entry["error_before"] for entry in entries)
    names = [f"{run.name}: {name}" if len(runs) > 1 else name for run, name, _ in shown]
    rows = [[each for *_, its in shown if (each := its[i]) is not None] for i in range(count)]
    return Chart(
        "repair",
        "What repair won back, block by block",
        _REPAIR + _TOGETHER * together + _GREW * grew,
        "For each block an open circle, the error before a step of repair, and a filled one, the "
        "error after it, joined by a line; a cross over the open circle where the step was "
        "rejected.",
        _under_each_other(panels, blocks or range(count)),
        _table(
            [[f"{name}, before", "after", "outcome"] for name in names],
            [entry_name(row[0], i) if row else str(i) for i, row in enumerate(rows)],
            [[_cells(entry) for entry in columns] for *_, columns in shown],
        ),
        legend,
    )


def _blocks_of_units(found: Sequence[tuple[RunFacts, Step]]) -> list[int] | None:
    """Return the block of each column where columns are units; None where they are blocks."""
    for run, step in found:
        if any("block" in entry for entry in step["blocks"] if entry is not None):
            if run.plan is not None:
                return [unit.block for unit in run.plan.units]
            if all(step["blocks"]):
                return [entry["block"] for entry in step["blocks"]]
    return None


def _in_columns(step: Step, blocks: Sequence[int] | None, count: int) -> list[Entry | None]:
    """Return a step's entry for each column: of what is told of a block, at its last unit."""
    told = {index: entry for index, entry in enumerate(step["blocks"]) if entry is not None}
    if blocks is not None and not any("block" in entry for entry in told.values()):
        last = {block: column for column, block in enumerate(blocks)}
        told = {last[at]: {**entry, "block": at, "path": ""} for at, entry in told.items()}
    return [told.get(column) for column in range(count)]


def _repair_mark(
    index: int, columns: Sequence[Entry | None], step: str, block_of: Sequence[int]
) -> Mark:
    """Return an open circle for before and a filled one for after, or a cross; and the words."""
    entry = columns[index]
    if entry is None:
        later = ((i, each) for i, each in enumerate(columns) if each is not None and i > index)
        last, of_last = next(later, (index, {"blocks": 0}))
        say = f"shares the error of block {block_of[last]}"
        if last - of_last["blocks"] >= index:
            say = "no error of its own"
        return Mark(f"Block {block_of[index]}, {step}: {say}")
    if not 1 <= entry["blocks"] <= index + 1:
        raise ValueError(f"block {index} cannot have changed with {entry['blocks']} blocks")
    before, after = entry["error_before"], entry["error_after"]
    say = f"error {before:.4f} before, {_number(after, 4)} after"
    experts = entry.get("experts", [])
    if not entry["kept"] and not was_rejected(entry):
        say = _NOTHING_CUT
    elif rejected := sum(not expert["kept"] for expert in experts):
        say += f", rejected in {rejected} of {len(experts)} experts"
    elif not entry["kept"]:
        say += ", rejected"
    return Mark(
        f"Block {entry_name(entry, index)}, {step}: {say}",
        dots=[("before", before), *([("after", after)] if entry["kept"] else [])],
        stick=(before, after) if entry["kept"] else None,
        is_crossed=was_rejected(entry),
        columns=entry["blocks"],
    )


def _number(value: float | None, digits: int) -> str:
    return "NaN" if value is None else f"{value:.{digits}f}"


def _cells(entry: Entry | None) -> list[str]:
    if entry is None:
        return [NOTHING] * 3
    outcome = "kept" if entry["kept"] else "rejected"
    if not entry["kept"] and not was_rejected(entry):
        outcome = _NOTHING_CUT
    if entry.get("training_steps"):
        outcome += f", {entry['training_steps']:,} training steps"
    elif entry["kept"] and entry.get("strength") is not None:
        outcome += f", strength {entry['strength']:g}"
    return [f"{entry['error_before']:.6f}", _number(entry["error_after"], 6), outcome]

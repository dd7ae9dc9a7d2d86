"""The error of every block before and after each step of repair."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from cfsp.repair.result import entry_name, was_rejected
from cfsp.result.facts import NOTHING
from cfsp.result.making import Step
from cfsp.result.page.chart import (
    Chart,
    Columns,
    Legend,
    block_table,
    by_block,
    nothing,
    panel_title,
)
from cfsp.result.page.svg import Scale, element, join, path, scale_from_zero
from cfsp.result.runs import RunFacts

Entry = dict[str, Any]

_HEIGHT = 170.0
# What the errors of a step are errors of.
_ERRORS = {"ridge": "relative squared error of the FFN output"}
_ERROR = "relative error of the hidden states after the block"
_CAPTION = (
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


def repair_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return a panel for every step of every run; None if no run has errors of a step."""
    found = [(run, step) for run in runs for step in run.repair_steps if any(step["blocks"])]
    if not found:
        return None
    blocks = _blocks_of_units(found)
    count = len(blocks) if blocks else max(len(step["blocks"]) for _, step in found)
    shown = [(run, str(step["name"]), _in_columns(step, blocks, count)) for run, step in found]
    entries = [entry for *_, columns in shown for entry in columns if entry]
    panels = []
    for run, name, columns in shown:
        # One scale for all runs; the error of rejected weights, of any size, is not drawn.
        highest = max(
            max(entry["error_before"], entry["error_after"] if entry["kept"] else 0.0)
            for _, other, its in shown
            if other == name
            for entry in its
            if entry
        )
        scale = scale_from_zero(float(highest), _HEIGHT, 0.0)
        marks = [
            (_words(i, columns, name), partial(_marks, entry, scale) if entry else nothing)
            for i, entry in enumerate(columns)
        ]
        title = f"{name.capitalize()}: {_ERRORS.get(name, _ERROR)}"
        panels.append(Columns(panel_title(title, run, runs), scale, marks))
    legend = [Legend("before", "before the step"), Legend("after", "after it")]
    if any(map(was_rejected, entries)):
        legend.append(Legend("rejected", "rejected"))
    together = any(entry["blocks"] > 1 for entry in entries)
    grew = any(entry["kept"] and entry["error_after"] > entry["error_before"] for entry in entries)
    names = [f"{run.name}: {name}" if len(runs) > 1 else name for run, name, _ in shown]
    return Chart(
        "repair",
        "What repair won back, block by block",
        _CAPTION + _TOGETHER * together + _GREW * grew,
        "For each block an open circle, the error before a step of repair, and a filled one, the "
        "error after it, joined by a line; a cross over the open circle where the step was "
        "rejected.",
        by_block(panels, [str(block) for block in (blocks or range(count))]),
        block_table(
            [[f"{name}, before", "after", "outcome"] for name in names],
            [_row_name(i, [columns[i] for *_, columns in shown]) for i in range(count)],
            [[_cells(entry) for entry in columns] for *_, columns in shown],
        ),
        legend,
    )


def _blocks_of_units(found: Sequence[tuple[RunFacts, Step]]) -> list[int] | None:
    """Return the block of each column where columns are units; None where they are blocks."""
    for run, step in found:
        if any("block" in entry for entry in step["blocks"] if entry):
            if run.plan is not None:
                return [unit.block for unit in run.plan.units]
            if all(step["blocks"]):
                return [entry["block"] for entry in step["blocks"]]
    return None


def _in_columns(step: Step, blocks: Sequence[int] | None, count: int) -> list[Entry | None]:
    """Return a step's entry for each column: of what is told of a block, at its last unit."""
    told = {index: entry for index, entry in enumerate(step["blocks"]) if entry}
    if blocks is not None and not any("block" in entry for entry in told.values()):
        last = {block: column for column, block in enumerate(blocks)}
        told = {last[block]: entry for block, entry in told.items()}
    return [told.get(column) for column in range(count)]


def _marks(entry: Entry, scale: Scale, x: float, width: float) -> Markup:
    """Return an open circle for before and a filled one for after, or a cross; and a line over."""
    before = scale(entry["error_before"])
    after = scale(entry["error_after"]) if entry["kept"] else before
    radius = 4.0 if width > 14 else 3.0
    parts = [element("circle", class_="before", cx=x, cy=before, r=radius)]
    if entry["kept"]:
        parts.insert(0, element("line", class_="stick", x1=x, x2=x, y1=before, y2=after))
        parts.append(element("circle", class_="after", cx=x, cy=after, r=radius))
    elif was_rejected(entry):
        low, high, top, bottom = (
            at + sign * (radius + 1.5) for at in (x, before) for sign in (-1, 1)
        )
        strokes = path([(low, top), (high, bottom)]) + path([(low, bottom), (high, top)])
        parts.append(element("path", class_="rejected", d=strokes))
    if entry["blocks"] > 1:
        start = x - (entry["blocks"] - 1) * width
        parts.insert(0, element("line", class_="stick", x1=start, x2=x, y1=after, y2=after))
    return join(parts)


def _words(index: int, columns: Sequence[Entry | None], step: str) -> str:
    entry = columns[index]
    if entry is None:
        later = ((i, each) for i, each in enumerate(columns) if each and i > index)
        last, of_last = next(later, (0, None))
        if of_last is None or last - of_last["blocks"] >= index:
            return f"Block {index}, {step}: no error of its own"
        return f"Block {index}, {step}: shares the error of block {last}"
    say = f"Block {entry_name(entry, index)}, {step}:"
    if _has_nothing_to_repair(entry):
        return f"{say} {_NOTHING_CUT}"
    say += f" error {entry['error_before']:.4f} before, {_number(entry['error_after'], 4)} after"
    experts = entry.get("experts", [])
    if rejected := sum(not expert["kept"] for expert in experts):
        return f"{say}, rejected in {rejected} of {len(experts)} experts"
    return say if entry["kept"] else f"{say}, rejected"


def _has_nothing_to_repair(entry: Entry) -> bool:
    return not entry["kept"] and not was_rejected(entry)


def _number(value: float | None, digits: int) -> str:
    return "NaN" if value is None else f"{value:.{digits}f}"


def _row_name(index: int, entries: Sequence[Entry | None]) -> str:
    return next((entry_name(entry, index) for entry in entries if entry), str(index))


def _cells(entry: Entry | None) -> list[str]:
    if entry is None:
        return [NOTHING] * 3
    outcome = "kept" if entry["kept"] else "rejected"
    if _has_nothing_to_repair(entry):
        outcome = _NOTHING_CUT
    if entry.get("training_steps"):
        outcome += f", {entry['training_steps']:,} training steps"
    elif entry["kept"] and entry.get("strength") is not None:
        outcome += f", strength {entry['strength']:g}"
    return [f"{entry['error_before']:.6f}", _number(entry["error_after"], 6), outcome]

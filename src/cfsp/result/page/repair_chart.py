"""The error of every block before and after each step of repair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cfsp.repair.repaired import entry_name, was_rejected
from cfsp.result.page.chart import (
    TITLE,
    Chart,
    Column,
    Legend,
    Panel,
    Table,
    block_bands,
    panel_name,
    stack_panels,
)
from cfsp.result.page.drawing import Bands, Scale, cross, element, join, scale_from_zero, shift
from cfsp.result.repair_steps import Step, error_name
from cfsp.result.runs import RunFacts
from cfsp.result.summary import NOTHING

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
    found = [
        (run, step) for run in runs for step in run.repair_steps if any(_entries(step).values())
    ]
    if not found:
        return None
    shown = _in_columns(found)
    entries = [entry for _, step in shown for entry in _entries(step).values()]
    blocks = _blocks_of_units(shown)

    def draw(width: int) -> Markup:
        bands = block_bands(max(len(step["blocks"]) for _, step in shown), width, blocks)
        panels = [
            _panel(panel_name(_title(step), run, runs), step, _highest(shown, step["name"]), bands)
            for run, step in shown
        ]
        return stack_panels(
            width,
            bands,
            panels,
            "For each block an open circle, the error before a step of repair, and a filled one, "
            "the error after it, joined by a line; a cross over the open circle where the step was "
            "rejected.",
        )

    legend = [Legend("before", "before the step"), Legend("after", "after it")]
    if any(map(was_rejected, entries)):
        legend.append(Legend("rejected", "rejected"))
    together = any(entry["blocks"] > 1 for entry in entries)
    grew = any(entry["kept"] and entry["error_after"] > entry["error_before"] for entry in entries)
    return Chart(
        "repair",
        "What repair won back, block by block",
        _CAPTION + _TOGETHER * together + _GREW * grew,
        draw,
        _table(shown, len(runs) > 1),
        legend,
    )


def _blocks_of_units(shown: Sequence[tuple[RunFacts, Step]]) -> list[int] | None:
    """Return the block of each column where columns are units; None where they are blocks."""
    for run, step in shown:
        if any("block" in entry for entry in _entries(step).values()):
            if run.plan is not None:
                return [unit.block for unit in run.plan.units]
            if len(_entries(step)) == len(step["blocks"]):
                return [entry["block"] for entry in step["blocks"]]
    return None


def _in_columns(found: Sequence[tuple[RunFacts, Step]]) -> list[tuple[RunFacts, Step]]:
    """Return steps with an entry for each column: of what is told of a block, at its last unit."""
    blocks = _blocks_of_units(found)
    if blocks is None:
        return list(found)
    last = {block: column for column, block in enumerate(blocks)}
    shown: list[tuple[RunFacts, Step]] = []
    for run, step in found:
        if not any("block" in entry for entry in _entries(step).values()):
            columns: list[Any] = [None] * len(blocks)
            for block, entry in _entries(step).items():
                columns[last[block]] = entry
            step = {**step, "blocks": columns}
        shown.append((run, step))
    return shown


def _title(step: Step) -> str:
    return f"{step['name'].capitalize()}: {error_name(step['name'])}"


def _entries(step: Step) -> dict[int, dict[str, Any]]:
    return {index: entry for index, entry in enumerate(step["blocks"]) if entry is not None}


def _highest(shown: Sequence[tuple[RunFacts, Step]], name: str) -> float:
    """Return the largest error that is drawn for a step, over all runs."""
    return max(
        # The error of rejected weights is not drawn: it may be of any size.
        max(float(entry["error_before"]), float(entry["error_after"]) if entry["kept"] else 0.0)
        for _, step in shown
        if step["name"] == name
        for entry in _entries(step).values()
    )


def _panel(title: str, step: Step, highest: float, bands: Bands) -> Panel:
    height = 170.0
    scale = scale_from_zero(highest, TITLE + height, TITLE)
    entries = _entries(step)
    columns = [
        Column(
            _words(index, entries, step["name"]),
            _marks(entries[index], index, scale, bands) if index in entries else Markup(""),
        )
        for index in range(len(step["blocks"]))
    ]
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    return Panel(title, height, scale, labels, columns)


def _marks(entry: dict[str, Any], index: int, scale: Scale, bands: Bands) -> Markup:
    x, y = bands.middle(index), scale(entry["error_before"])
    radius = 4.0 if bands.width > 14 else 3.0
    if entry["kept"]:
        y_after = scale(entry["error_after"])
        marks = shift(x, y, y_after, radius)
    else:
        y_after = y
        circle = element("circle", class_="before", cx=x, cy=y, r=radius)
        marks = join([circle, cross(x, y, radius + 1.5)]) if was_rejected(entry) else circle
    if entry["blocks"] == 1:
        return marks
    start = bands.middle(index + 1 - entry["blocks"])
    over = element("line", class_="stick", x1=start, x2=x, y1=y_after, y2=y_after)
    return join([over, marks])


def _words(index: int, entries: dict[int, dict[str, Any]], step: str) -> str:
    if index not in entries:
        last = min((other for other in entries if other > index), default=None)
        if last is None or last - entries[last]["blocks"] >= index:
            return f"Block {index}, {step}: no error of its own"
        return f"Block {index}, {step}: shares the error of block {last}"
    entry = entries[index]
    say = f"Block {entry_name(entry, index)}, {step}:"
    if _has_nothing_to_repair(entry):
        return f"{say} {_NOTHING_CUT}"
    before, after = f"{entry['error_before']:.4f}", _number(entry["error_after"], 4)
    say += f" error {before} before, {after} after"
    experts = entry.get("experts", [])
    if rejected := sum(not expert["kept"] for expert in experts):
        return f"{say}, rejected in {rejected} of {len(experts)} experts"
    return say if entry["kept"] else f"{say}, rejected"


def _has_nothing_to_repair(entry: dict[str, Any]) -> bool:
    return not entry["kept"] and not was_rejected(entry)


def _number(value: float | None, digits: int) -> str:
    return "NaN" if value is None else f"{value:.{digits}f}"


def _table(shown: Sequence[tuple[RunFacts, Step]], several: bool) -> Table:
    head = ["block"]
    for run, step in shown:
        name = f"{run.name}: {step['name']}" if several else str(step["name"])
        head += [f"{name}, before", "after", "outcome"]
    blocks = max(len(step["blocks"]) for _, step in shown)
    rows = []
    for index in range(blocks):
        entries = [_entries(step).get(index) for _, step in shown]
        name = next((entry_name(e, index) for e in entries if e is not None), str(index))
        rows.append([name, *(cell for entry in entries for cell in _cells(entry))])
    return Table(head, rows)


def _cells(entry: dict[str, Any] | None) -> list[str]:
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

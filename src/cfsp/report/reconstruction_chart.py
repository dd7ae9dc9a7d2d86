"""The error of every block's hidden states before and after repair against the dense stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cfsp.report.chart import Chart, Legend
from cfsp.report.drawing import Bands, Scale, cross, element, join, scale_from_zero, shift
from cfsp.report.panels import (
    TITLE,
    Column,
    Panel,
    block_bands,
    block_table,
    panel_name,
    stack_panels,
)
from cfsp.report.run_facts import RunFacts
from cfsp.report.summary import NOTHING

_CAPTION = (
    "Distance between a block's output hidden states and those of the dense model, relative to the "
    "latter and averaged over the tokens of calibration windows that were held out. "
    "A block gets what the pruned blocks before it give, so the error that it begins with is also "
    "theirs."
)
_TOGETHER = (
    " Blocks that train together share one error, measured after the last of them; a block without "
    "a mark has none of its own."
)


@dataclass(frozen=True)
class _Step:
    """One way to repair against the dense stream.

    Attributes:
        key: what the manifest calls it.
        chart: name of its chart.
        title: of its chart.
        act: what is done to a block.
        done: what a block is then.
    """

    key: str
    chart: str
    title: str
    act: str
    done: str


_SEQUENTIAL = _Step(
    "sequential", "sequential", "How near sequential repair came to the dense model", "the fit",
    "fitted",
)  # fmt: skip
_LOCAL = _Step(
    "local", "reconstruction", "How near local reconstruction came to the dense model", "training",
    "trained",
)  # fmt: skip


def sequential_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return the error of every block's hidden states before and after sequential repair."""
    return _chart(runs, _SEQUENTIAL)


def reconstruction_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return the error of every block's hidden states before and after local reconstruction."""
    return _chart(runs, _LOCAL)


def _chart(runs: Sequence[RunFacts], step: _Step) -> Chart | None:
    trained = [run for run in runs if any(run.reconstructed_blocks(step.key))]
    if not trained:
        return None
    entries = [entry for run in trained for entry in run.reconstructed_blocks(step.key)]
    drawn = [entry for entry in entries if entry is not None]
    count = len(trained[0].reconstructed_blocks(step.key))
    # The error of a training that was thrown away is not drawn: it may be of any size.
    highest = max(
        max(entry["error_before"], entry["error_after"] if entry["is_better"] else 0.0)
        for entry in drawn
    )

    def draw(width: int) -> Markup:
        bands = block_bands(count, width)
        panels = [
            _error_panel(
                panel_name("Relative error of hidden states", run, runs),
                run.reconstructed_blocks(step.key),
                step,
                highest,
                bands,
            )
            for run in trained
        ]
        return stack_panels(
            width,
            bands,
            panels,
            f"For each block an open circle, the error before {step.act}, and a filled one, the "
            "error after it, joined by a line; a cross over the open circle where the block was "
            "left alone.",
        )

    def cells(run: int, index: int) -> list[str]:
        return _error_cells(trained[run].reconstructed_blocks(step.key)[index], step)

    legend = [Legend("before", f"before {step.act}"), Legend("after", f"after {step.act}")]
    if not all(entry["is_better"] for entry in drawn):
        legend.append(Legend("alone", f"left alone, as {step.act} did not help"))
    return Chart(
        step.chart,
        step.title,
        _CAPTION if len(drawn) == len(entries) else _CAPTION + _TOGETHER,
        draw,
        block_table(trained, ("before", f"after {step.act}", "steps", "outcome"), count, cells),
        legend,
    )


def _error_panel(
    title: str,
    blocks: Sequence[dict[str, Any] | None],
    step: _Step,
    highest: float,
    bands: Bands,
) -> Panel:
    height = 190.0
    scale = scale_from_zero(highest, TITLE + height, TITLE)
    columns = [
        Column(
            _words(i, block, step), Markup("") if block is None else _marks(block, i, scale, bands)
        )
        for i, block in enumerate(blocks)
    ]
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    return Panel(title, height, scale, labels, columns)


def _marks(block: dict[str, Any], index: int, scale: Scale, bands: Bands) -> Markup:
    x, y = bands.middle(index), scale(block["error_before"])
    radius = 4.0 if bands.width > 14 else 3.0
    if block["is_better"]:
        return shift(x, y, scale(block["error_after"]), radius)
    circle = element("circle", class_="before", cx=x, cy=y, r=radius)
    return join([circle, cross(x, y, radius + 1.5)])


def _words(index: int, block: dict[str, Any] | None, step: _Step) -> str:
    if block is None:
        return f"Block {index}: no error of its own"
    after = block["error_after"]
    say = f"Block {index}: error {block['error_before']:.4f}, after {step.act} "
    say += "no number" if after is None else f"{after:.4f}"
    return say if block["is_better"] else f"{say}, left alone because {step.act} did not help"


def _error_cells(block: dict[str, Any] | None, step: _Step) -> list[str]:
    if block is None:
        return [NOTHING] * 4
    after = block["error_after"]
    return [
        f"{block['error_before']:.6f}",
        "no number" if after is None else f"{after:.6f}",
        f"{block['steps']:,}",
        step.done if block["is_better"] else "left alone",
    ]

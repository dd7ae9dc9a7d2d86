"""The error of every block's hidden states before and after local reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
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
    "latter and averaged over the tokens of calibration windows that were held out from training. "
    "A block gets what the pruned blocks before it give, so the error that it begins with is also "
    "theirs."
)
_TOGETHER = (
    " Blocks that train together share one error, measured after the last of them; a block without "
    "a mark has none of its own."
)


def reconstruction_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return the error of every block's hidden states before and after local reconstruction."""
    trained = [run for run in runs if any(run.reconstructed_blocks)]
    if not trained:
        return None
    entries = [entry for run in trained for entry in run.reconstructed_blocks]
    drawn = [entry for entry in entries if entry is not None]
    count = len(trained[0].reconstructed_blocks)
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
                run.reconstructed_blocks,
                highest,
                bands,
            )
            for run in trained
        ]
        return stack_panels(
            width,
            bands,
            panels,
            "For each trained block an open circle, the error before training, and a filled one, "
            "the error after it, joined by a line; a cross over the open circle where the block "
            "was left alone.",
        )

    def cells(run: int, index: int) -> list[str]:
        return _error_cells(trained[run].reconstructed_blocks[index])

    legend = [Legend("before", "before training"), Legend("after", "after training")]
    if not all(entry["is_better"] for entry in drawn):
        legend.append(Legend("alone", "left alone, as training did not help"))
    return Chart(
        "reconstruction",
        "How near local reconstruction came to the dense model",
        _CAPTION if len(drawn) == len(entries) else _CAPTION + _TOGETHER,
        draw,
        block_table(trained, ("before", "after training", "steps", "outcome"), count, cells),
        legend,
    )


def _error_panel(
    title: str, blocks: Sequence[dict[str, Any] | None], highest: float, bands: Bands
) -> Panel:
    height = 190.0
    scale = scale_from_zero(highest, TITLE + height, TITLE)
    columns = [
        Column(_words(i, block), Markup("") if block is None else _marks(block, i, scale, bands))
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


def _words(index: int, block: dict[str, Any] | None) -> str:
    if block is None:
        return f"Block {index}: no error of its own"
    after = block["error_after"]
    say = f"Block {index}: error {block['error_before']:.4f}, after training "
    say += "no number" if after is None else f"{after:.4f}"
    return say if block["is_better"] else f"{say}, left alone because training did not help"


def _error_cells(block: dict[str, Any] | None) -> list[str]:
    if block is None:
        return [NOTHING] * 4
    after = block["error_after"]
    return [
        f"{block['error_before']:.6f}",
        "no number" if after is None else f"{after:.6f}",
        f"{block['steps']:,}",
        "trained" if block["is_better"] else "left alone",
    ]

"""The error of every block's FFN before and after repair. Shapes: L blocks."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from cfsp.report.channels import energy_removed
from cfsp.report.chart import Chart, Legend
from cfsp.report.drawing import Bands, element, join, scale_from_zero, shift
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


def restoration_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return the error of every block's FFN before and after repair."""
    restored = [run for run in runs if run.restored_blocks]
    if not restored:
        return None
    count = len(restored[0].restored_blocks)
    predictions = [_predicted_L(run) for run in restored]
    highest = max(
        max(float(block["error_before"]) for run in restored for block in run.restored_blocks),
        max((value for each in predictions for value in each), default=0.0),
    )

    def draw(width: int) -> Markup:
        bands = block_bands(count, width)
        panels = [
            _error_panel(
                panel_name("Relative squared error", run, runs),
                run,
                predicted,
                highest,
                bands,
            )
            for run, predicted in zip(restored, predictions, strict=True)
        ]
        return stack_panels(
            width,
            bands,
            panels,
            "For each block an open circle, the error after pruning alone, and a filled one, the "
            "error after repair, joined by a line.",
        )

    def cells(run: int, index: int) -> list[str]:
        return _error_cells(
            restored[run].restored_blocks[index], predictions[run][index : index + 1]
        )

    nouns = ("before", "after", "energy removed", "ridge")
    legend = [Legend("before", "pruned"), Legend("after", "repaired")]
    if any(predictions):
        legend.append(Legend("predicted", "activation energy removed"))
    return Chart(
        "restoration",
        "What the repair won back, block by block",
        "Error of the FFN's output, measured on calibration windows that were held out from the "
        "least-squares fit. "
        "The short line is the error that the statistics alone predict: the share of activation "
        "energy that was removed.",
        draw,
        block_table(restored, nouns, count, cells),
        legend,
    )


def _error_panel(
    title: str, run: RunFacts, predicted: Sequence[float], highest: float, bands: Bands
) -> Panel:
    height = 190.0
    scale = scale_from_zero(highest, TITLE + height, TITLE)
    radius = 4.0 if bands.width > 14 else 3.0
    columns = []
    for i, block in enumerate(run.restored_blocks):
        before, after = float(block["error_before"]), float(block["error_after"])
        x = bands.middle(i)
        parts = [shift(x, scale(before), scale(after), radius)]
        say = f"Block {i}: error {before:.4f}, repaired {after:.4f}"
        if block["ridge"] is None:
            say += ", left alone because repair did not help"
        if predicted:
            y, half = scale(predicted[i]), bands.width * 0.4
            parts.insert(
                0, element("line", class_="predicted", x1=x - half, x2=x + half, y1=y, y2=y)
            )
            say += f", activation energy removed {predicted[i]:.4f}"
        columns.append(Column(say, join(parts)))
    labels = {value: f"{value:g}" for value in scale.ticks(4)}
    return Panel(title, height, scale, labels, columns)


def _error_cells(block: dict[str, float | None], predicted: Sequence[float]) -> list[str]:
    ridge = block["ridge"]
    return [
        f"{block['error_before']:.6f}",
        f"{block['error_after']:.6f}",
        f"{predicted[0]:.6f}" if predicted else NOTHING,
        "left alone" if ridge is None else f"{ridge:g}",
    ]


def _predicted_L(run: RunFacts) -> list[float]:
    if run.statistics is None or run.plan is None:
        return []
    pairs = zip(run.statistics.blocks, run.plan.blocks, strict=True)
    return [energy_removed(statistics, block.kept) for statistics, block in pairs]

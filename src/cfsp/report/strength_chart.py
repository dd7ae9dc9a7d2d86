"""How strong the channels of every block are, and where the cut runs. Shapes: N bins."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from cfsp.report.channels import BlockChannels, Distribution, distribution
from cfsp.report.chart import (
    TITLE,
    Chart,
    Column,
    Legend,
    Panel,
    block_bands,
    block_table,
    panel_name,
    short,
    stack_panels,
)
from cfsp.report.drawing import Bands, Scale, element, join, path
from cfsp.report.runs import RunFacts

# Half the breadth of a single channel, so that it can be seen.
_LEAST_REACH = 0.7


def strength_chart(runs: Sequence[RunFacts]) -> Chart | None:
    """Return how strong the channels of every block are, and where the cut runs."""
    measured = [
        (run, distribution(run.statistics, run.plan))
        for run in runs
        if run.statistics is not None and run.plan is not None
    ]
    if not measured:
        return None
    count = len(measured[0][1].blocks)

    def draw(width: int) -> Markup:
        bands = block_bands(count, width)
        panels = [
            _strength_panel(panel_name("Root mean square activation", run, runs), shape, bands)
            for run, shape in measured
        ]
        return stack_panels(
            width,
            bands,
            panels,
            "One upright shape for each block: its breadth at a height is the number of channels "
            "with that root mean square activation. The part that stays is coloured.",
        )

    def cells(run: int, index: int) -> list[str]:
        block = measured[run][1].blocks[index]
        return [
            short(block.median),
            short(block.strongest),
            short(block.cut),
            f"{block.energy_removed:.2%}",
        ]

    nouns = ("median", "strongest", "weakest kept", "energy removed")
    return Chart(
        "strengths",
        "How strong the channels are, and where the cut runs",
        "The breadth of a shape is the number of channels of that strength, on a logarithmic "
        "scale; the few beyond an end of the scale count at that end. Where channels were chosen "
        "by activation alone, the cut is a level line.",
        draw,
        block_table([run for run, _ in measured], nouns, count, cells),
        [Legend("kept", "kept"), Legend("gone", "removed")],
    )


def _strength_panel(title: str, shape: Distribution, bands: Bands) -> Panel:
    height = 260.0
    edges = shape.edges_N1
    scale = Scale(edges[0], edges[-1], TITLE + height, TITLE)
    columns = [
        Column(_strength_words(i, block), _violin(block, edges, scale, bands, i))
        for i, block in enumerate(shape.blocks)
    ]
    labels = {math.log10(value): f"{value:,.10g}" for value in _log_ticks(edges[0], edges[-1])}
    return Panel(title, height, scale, labels, columns)


def _violin(
    block: BlockChannels, edges: Sequence[float], scale: Scale, bands: Bands, index: int
) -> Markup:
    both = [kept + removed for kept, removed in zip(block.kept_N, block.removed_N, strict=True)]
    widest = max(both)
    x, half = bands.middle(index), bands.width * 0.46

    def outline(counts: Sequence[int]) -> str:
        right, left = [], []
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            reach = max(half * count / widest, _LEAST_REACH) if count else 0.0
            right += [(x + reach, scale(low)), (x + reach, scale(high))]
            left += [(x - reach, scale(low)), (x - reach, scale(high))]
        return path([*right, *reversed(left)], closed=True)

    return join(
        [
            element("path", class_="gone", d=outline(both)),
            element("path", class_="kept", d=outline(block.kept_N)),
        ]
    )


def _strength_words(index: int, block: BlockChannels) -> str:
    return (
        f"Block {index}: median {short(block.median)}, strongest {short(block.strongest)}, "
        f"weakest kept {short(block.cut)}, {block.energy_removed:.2%} of the activation "
        "energy removed"
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round values between two powers of ten: finer steps where the range is short."""
    digits = (1.0, 2.0, 5.0) if high - low < 3 else (1.0,)
    tens = range(math.floor(low), math.ceil(high) + 1)
    values = [digit * 10.0**power for power in tens for digit in digits]
    return [value for value in values if low <= math.log10(value) <= high]

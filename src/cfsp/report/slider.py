"""The slider: it moves over the models that were made and measured, from large to small.

Nothing is computed in between: each stop is a run, with its own widths and perplexities. Runs that
were made in the same way are one series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from cfsp.planning.plan_file import PruningPlan
from cfsp.report.block_chart import blocks_of_columns, column_names, columns_of, width_panel
from cfsp.report.chart import Table, block_bands, stack_panels
from cfsp.report.drawing import NARROW, WIDE
from cfsp.report.runs import RunFacts
from cfsp.report.summary import (
    NOTHING,
    Cell,
    measured_conditions,
    percent_less,
    perplexity_of_original,
    short_names,
)
from cfsp.result.repair_steps import steps_in_words

_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Stop:
    """One model.

    Attributes:
        name: of the run.
        cells: what the page says about it, in the order of `Slider.nouns`.
        width_L: FFN channels that each column of the charts keeps; 0 of a block without an FFN.
    """

    name: str
    cells: Sequence[Cell]
    width_L: Sequence[int]


@dataclass(frozen=True)
class Slider:
    """Series of models.

    Attributes:
        nouns: what is known of each model, and under which conditions.
        series: how models were made -> the original and those models, from large to small.
        plan: of one of them, which says what columns are; None for the blocks.
    """

    nouns: Sequence[tuple[str, str]]
    series: dict[str, list[Stop]]
    plan: PruningPlan | None = None

    @property
    def drawings(self) -> list[Markup]:
        """The widths of the first series' first model; the page's script sets those of others."""
        dense, first = next(iter(self.series.values()))[:2]
        return [
            _drawing(dense.width_L, first.width_L, width, self.plan) for width in (WIDE, NARROW)
        ]

    @property
    def table(self) -> Table:
        """All stops as text."""
        several = len(self.series) > 1
        rows = [
            [f"{name}: {stop.name}" if several else stop.name, *map(_in_one, stop.cells)]
            for name, stops in self.series.items()
            for stop in stops
        ]
        return Table(["model", *(noun for noun, _ in self.nouns)], rows)

    def to_json(self) -> dict[str, Any]:
        """Return what the script needs."""
        return {
            name: [
                {
                    "name": stop.name,
                    "cells": [[cell.value, cell.note] for cell in stop.cells],
                    "widths": list(stop.width_L),
                }
                for stop in stops
            ]
            for name, stops in self.series.items()
        }


def slider(runs: Sequence[RunFacts]) -> Slider | None:
    """Return the slider over runs of one original; None if no two differ in nothing but size."""
    together: dict[str, list[RunFacts]] = {}
    for run in runs:
        if "parameters_before" in run.manifest:
            together.setdefault(_way(run), []).append(run)
    series = {
        way: sorted(found, key=lambda run: -int(run.manifest["parameters_after"]))
        for way, found in together.items()
        if len({run.manifest["parameters_after"] for run in found}) > 1
    }
    if not series:
        return None
    every = measured_conditions([run for found in series.values() for run in found])
    names = short_names(each.text for each in every)
    nouns = [("parameters", ""), ("FFN channels kept", "")]
    nouns += [(f"perplexity, {names[each.text]}", str(each)) for each in every]
    first = next(iter(series.values()))[0].manifest
    plan = next((run.plan.only("ffn") for run in runs if run.plan is not None), None)
    before: list[int] = first["widths_before"]
    dense = {each: perplexity_of_original(runs, each) for each in every}
    original = Stop(
        "the original",
        [
            Cell(f"{first['parameters_before']:,}"),
            Cell(f"{sum(before):,}"),
            *(Cell(NOTHING if value is None else f"{value:.2f}") for value in dense.values()),
        ],
        _by_column(before, plan),
    )

    def stop(run: RunFacts) -> Stop:
        size = [
            Cell(
                f"{run.manifest['parameters_after']:,}",
                percent_less(run.manifest["model_sparsity"]),
            ),
            Cell(
                f"{sum(run.manifest['intermediate_sizes']):,}",
                percent_less(run.manifest["ffn_sparsity"]),
            ),
        ]
        found = [run.measured.perplexity.get(each, {}).get("after") for each in every]
        quality = [
            _perplexity(value, dense[each]) for value, each in zip(found, every, strict=True)
        ]
        widths = _by_column(run.kept_by_unit, plan)
        return Stop(run.name, size + quality, widths)

    stops = {way: [original, *map(stop, found)] for way, found in series.items()}
    return Slider(nouns, stops, plan)


def _by_column(widths: Sequence[int], plan: PruningPlan | None) -> Sequence[int]:
    """Return a width for each column of the charts, from one for each FFN."""
    if plan is None:
        return widths
    left = iter(widths)
    return [0 if unit is None else next(left) for unit in columns_of(plan)]


def _perplexity(value: float | None, dense: float | None) -> Cell:
    if value is None:
        return Cell(NOTHING)
    return Cell(f"{value:.2f}", f"{_TIMES} {value / dense:.2f}" if dense else "")


def _way(run: RunFacts) -> str:
    """Return how a run was made, but for how much was removed."""
    if method := (run.manifest.get("sweep") or {}).get("method"):
        return str(method)
    criterion = run.manifest.get("criterion") or {}
    metrics = [
        str(criterion[key]) for key in ("block_metric", "channel_metric") if key in criterion
    ]
    # Which blocks a step rejected differs from run to run.
    steps = steps_in_words([{**step, "blocks": []} for step in run.repair_steps])
    recovered = ", recovered" if "recovery" in run.manifest else ""
    return f"{' and '.join(metrics) or 'unknown'}; repair: {steps}{recovered}"


def _drawing(
    before_L: Sequence[int], after_L: Sequence[int], width: int, plan: PruningPlan | None
) -> Markup:
    blocks, names = (None, None) if plan is None else (blocks_of_columns(plan), column_names(plan))
    bands = block_bands(len(before_L), width, blocks)
    panel = width_panel("Channels that stay", before_L, after_L, bands, names)
    return stack_panels(
        width,
        bands,
        [panel],
        "One column for each block: how many of its FFN channels the chosen model keeps, within "
        "the full width.",
    )


def _in_one(cell: Cell) -> str:
    return f"{cell.value} ({cell.note})" if cell.note else cell.value

"""Sensitivity of a block: how far the model's predictions move when its FFNs alone are pruned.

The same is measured of its attention alone, where that may lose KV groups.

Angular distance says how much a block does, sensitivity how much of that its weakest channels do.
It is measured by masking, forward passes only, on the whole model in memory: no block can be
dropped while others are tried. What enters a block does not depend on its own pruning, so only
the blocks from it on are computed again: half a forward pass for each block on average.

Shapes: N windows, T tokens, L blocks, U units.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from cfsp.calibration.statistics import Sensitivity, Statistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.errors import CalibrationError
from cfsp.job import Job
from cfsp.planning.channels import choose_channels
from cfsp.progress import item_progress
from cfsp.selection.divergence import MaskedModel, few_beginnings, load_whole
from cfsp.settings import AUTO_METRIC, SENSITIVITY, UNIT_PARTS, Criterion, Part
from cfsp.streaming.runtime import Runtime, fits
from cfsp.streaming.work_dir import load_or_compute
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

# Half of every block's channels: the ranking of blocks hardly depends on how many go (LOG.md), so
# that one measurement serves every budget.
SENSITIVITY_SPARSITY = 0.5


def block_sensitivities(
    source: WeightSource,
    model: PreTrainedModel,
    tokens_NT: Tensor,
    kept_U: Sequence[Sequence[int]],
    parts: Collection[Part] = UNIT_PARTS,
) -> dict[Part, list[float]]:
    """Return how far pruning a part of each block alone moves the predictions, in nats per token.

    KL(dense || one block pruned), the mean over tokens; see `cfsp.selection.divergence`. All
    units of one part of a block are pruned together; a block without any moves nothing.
    """
    kept_of: dict[tuple[int, Part], dict[int, Sequence[int]]] = {}
    for index, unit in enumerate(source.units):
        if unit.part in parts:
            kept_of.setdefault((unit.block, unit.part), {})[index] = kept_U[index]
    total: dict[Part, list[float]] = {
        part: [0.0] * source.architecture.block_count for _, part in kept_of
    }
    form = None
    with item_progress("sensitivity", len(tokens_NT) * len(kept_of), "pass") as bar:
        for tokens_T in tokens_NT:  # apart: what enters all blocks is kept of one window
            masked = MaskedModel(source, model, [tokens_T[None]], form)
            form = masked.form
            for (block, part), kept in sorted(kept_of.items()):
                total[part][block] += masked.divergence(kept=kept, first=block)
                bar.update()
    return {part: [each / len(tokens_NT) for each in total_L] for part, total_L in total.items()}


def follow_sensitivity(
    source: WeightSource, criterion: Criterion, runtime: Runtime, *, has_images: bool
) -> bool:
    """Return whether widths will follow the sensitivity of blocks.

    Where the block metric is `auto`, they do if it can be measured: the windows are of text alone,
    and the whole model fits into memory.
    """
    if criterion.block_metric != AUTO_METRIC:
        return criterion.block_metric == SENSITIVITY
    return not has_images and fits(source, runtime)


def with_needed_sensitivity(job: Job, statistics: Statistics, windows: Windows) -> Statistics:
    """Add the sensitivity of blocks where widths follow it, of the parts that may lose channels.

    Statistics that have it stay as they are. A killed run goes on with what it had measured, or had
    decided not to measure: there may be another amount of memory now. Of several processes the
    first decides and measures.
    """
    source, runtime, work_dir = job.source, job.runtime, job.work_dir
    criterion, parts = job.criterion, {"ffn", *job.budget.channel_parts}
    if statistics.sensitivity is not None and all(map(statistics.sensitivity.of_part, parts)):
        return statistics

    def measure() -> dict[str, Any]:
        if not follow_sensitivity(source, criterion, runtime, has_images=windows.has_images):
            return {"sensitivity": None}
        with work_dir.watch.stage("sensitivity"):
            found = with_sensitivity(source, statistics, windows, criterion, runtime, parts)
        assert found.sensitivity is not None
        return {"sensitivity": asdict(found.sensitivity)}

    # Other windows would be another measurement.
    name = f"sensitivity-{windows.digest[:8]}"
    found = work_dir.team.from_first(
        lambda: load_or_compute(work_dir, name, measure)["sensitivity"]
    )
    blocks = len(statistics.blocks)
    return replace(statistics, sensitivity=Sensitivity.from_json(found, blocks))


def with_sensitivity(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    criterion: Criterion,
    runtime: Runtime,
    parts: Collection[Part] = UNIT_PARTS,
) -> Statistics:
    """Add the sensitivity of blocks, measured on the beginnings of a few windows of every text."""
    tokens_NT = few_beginnings(windows).tokens_NT
    kept_U = [
        choose_channels(
            source,
            unit,
            observed,
            max(1, round(source.units[unit].width * (1 - SENSITIVITY_SPARSITY))),
            criterion,
        )
        for unit, observed in enumerate(statistics.units)
    ]
    model = load_whole(source, runtime, "measuring the sensitivity of blocks")
    found = block_sensitivities(source, model, tokens_NT, kept_U, parts)
    if not all(map(math.isfinite, chain(*found.values()))):
        raise CalibrationError("the model predicts NaN; use --dtype float32 or bfloat16")
    of_part: dict[str, Sensitivity] = {}
    for part, found_L in found.items():
        kept_L, all_L = ([0] * len(found_L) for _ in range(2))
        for unit, kept_K in zip(source.units, kept_U, strict=True):
            if unit.part == part:
                kept_L[unit.block] += len(kept_K)
                all_L[unit.block] += unit.width * unit.ffns
        of_part[part] = Sensitivity(
            # Equal predictions may differ by rounding, in either direction.
            tuple(max(0.0, divergence) for divergence in found_L),
            tuple(k / a if a else 1.0 for k, a in zip(kept_L, all_L, strict=True)),
            len(tokens_NT),
        )
    of_ffns = of_part.pop("ffn")
    return replace(statistics, sensitivity=replace(of_ffns, other_parts=of_part))

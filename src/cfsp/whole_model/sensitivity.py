"""Sensitivity of a block: how far the model's predictions move when that block alone is pruned.

Angular distance says how much a block does, sensitivity how much of that its weakest channels do.
It is measured by masking, forward passes only, on the whole model in memory: no block can be
dropped while others are tried. What enters a block does not depend on its own pruning, so only
the blocks from it on are computed again: half a forward pass for each block on average.

Shapes: N windows, T tokens, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.statistics import Sensitivity, Statistics
from cfsp.checkpoint.families import architecture_of, family_of
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.engine.resumed_forward import hidden_states_entering, resumed_at
from cfsp.errors import CalibrationError
from cfsp.planning.fine import strongest_channels
from cfsp.planning.make import ffn_scores
from cfsp.progress import item_progress
from cfsp.settings import SENSITIVITY_METRICS
from cfsp.text.windows import few_windows
from cfsp.whole_model.divergence import dense_predictions
from cfsp.whole_model.load import load_whole
from cfsp.whole_model.masks import check_can_be_masked, masked_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.settings import Criterion
    from cfsp.text.windows import Windows

# Half of every block's channels: the ranking of blocks hardly depends on how many go (LOG.md), so
# that one measurement serves every budget.
SENSITIVITY_SPARSITY = 0.5

# The divergence of a pruned block has little noise (LOG.md), and each window costs half a forward
# pass for every block.
SENSITIVITY_WINDOWS = 4


def block_sensitivities(
    model: PreTrainedModel,
    tokens_NT: Tensor,
    kept_L: Sequence[Sequence[int]],
    on_block: Callable[[], object] = lambda: None,
) -> list[float]:
    """Return how far each block's pruning alone moves the predictions, in nats per token.

    KL(dense || one block pruned), the mean over tokens; see `cfsp.whole_model.divergence`.

    Args:
        model: the whole dense model, in evaluation mode.
        tokens_NT: windows without padding; they pass one at a time.
        kept_L: channels of each block that stay when it is pruned.
        on_block: is called after each block of each window.

    Raises:
        UnsupportedModelError: the blocks are mixtures of experts.
    """
    family = family_of(model.config)
    check_can_be_masked(family)
    blocks = blocks_of(model, architecture_of(model.config))
    total_L = [0.0] * len(blocks)
    with torch.inference_mode():
        for tokens_T in tokens_NT:
            with hidden_states_entering(blocks) as entering_L:
                dense = dense_predictions(model, tokens_T[None])
            for index, kept_K in enumerate(kept_L):
                with (
                    masked_block(blocks[index], family, kept_K),
                    resumed_at(blocks, index, entering_L[index]),
                ):
                    total_L[index] += dense.divergence(model)
                on_block()
    return [total / len(tokens_NT) for total in total_L]


def with_sensitivity(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    criterion: Criterion,
    engine: Engine,
) -> Statistics:
    """Measure the sensitivity of blocks on a few windows, if the criterion needs it."""
    if criterion.block_metric not in SENSITIVITY_METRICS:
        return statistics
    few = few_windows(windows, SENSITIVITY_WINDOWS)
    found = measure_sensitivity(source, statistics, few, criterion, engine)
    return replace(statistics, sensitivity=found)


def measure_sensitivity(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    criterion: Criterion,
    engine: Engine,
) -> Sensitivity:
    """Prune every block alone by half and measure what that does to the predictions.

    Args:
        source: the model.
        statistics: say which channels are the weakest.
        windows: to measure on; a few are enough.
        criterion: what makes a channel important.
        engine: where and in what to compute.

    Raises:
        UnsupportedModelError: the blocks are mixtures of experts.
        UsageError: the model does not fit into memory.
        CalibrationError: the model predicts NaN.
    """
    check_can_be_masked(source.family)
    kept_L = [
        strongest_channels(score_F, max(1, round(len(score_F) * (1 - SENSITIVITY_SPARSITY))))
        for score_F in _scores(source, statistics, criterion)
    ]
    model = load_whole(source, engine, "measuring the sensitivity of blocks")
    total = len(windows.tokens_NT) * len(kept_L)
    with item_progress("sensitivity", total, "pass") as bar:
        found_L = block_sensitivities(model, windows.tokens_NT, kept_L, bar.update)
    if not all(map(math.isfinite, found_L)):
        raise CalibrationError("the model predicts NaN; use --dtype float32 or bfloat16")
    # Equal predictions may differ by rounding, in either direction.
    positive_L = tuple(max(0.0, divergence) for divergence in found_L)
    return Sensitivity(positive_L, SENSITIVITY_SPARSITY, len(windows.tokens_NT))


def _scores(source: WeightSource, statistics: Statistics, criterion: Criterion) -> list[Tensor]:
    """Return the channel scores of every block of a model without experts."""
    assert source.family.experts is None
    return [
        next(iter(ffn_scores(source, block, observed, criterion)))
        for block, observed in enumerate(statistics.blocks)
    ]

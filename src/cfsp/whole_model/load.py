"""What takes the whole model in memory, where all else reads one block at a time.

The sensitivity of blocks, the search for widths and text that the model writes itself: each runs
the model as a whole, many times. A model that does not fit is refused before it is read.

Shapes: N windows, T tokens, L blocks.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from cfsp.calibration.calibrate import check_tokens
from cfsp.calibration.statistics import Sensitivity, Statistics
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.engine.whole import check_fits
from cfsp.errors import CalibrationError
from cfsp.planning.fine import strongest_channels
from cfsp.planning.make import BlockWidths, Criterion, ffn_scores
from cfsp.progress import item_progress
from cfsp.repair.observation import is_held_out
from cfsp.whole_model.masks import check_can_be_masked
from cfsp.whole_model.own_text import first_token, own_windows
from cfsp.whole_model.sensitivity import block_sensitivities
from cfsp.whole_model.width_search import search_widths

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import CalibrationText, Compute, Engine, PruneSettings
    from cfsp.text.windows import Windows

# Half of every block's channels: the ranking of blocks hardly depends on how many go (LOG.md), so
# that one measurement serves every budget.
SENSITIVITY_SPARSITY = 0.5


def load_whole(source: WeightSource, engine: Engine, purpose: str) -> PreTrainedModel:
    """Return the whole model of a source, ready to run; one in memory is itself.

    Args:
        source: the model.
        engine: where and in what.
        purpose: what needs it, for the error.

    Raises:
        UsageError: it does not fit into memory.
    """
    if isinstance(source, LoadedModel):
        return source.model
    assert isinstance(source, Checkpoint)
    check_fits(source, engine.dtype, purpose)
    return load(source.directory, dtype=engine.dtype, device=engine.device)


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


def searched(
    source: WeightSource,
    widths: BlockWidths,
    statistics: Statistics,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
) -> BlockWidths:
    """Search for better widths of the same sum if the settings ask for it.

    Args:
        source: the model.
        widths: to begin with.
        statistics: say which channels are the weakest.
        windows: of the calibration; those that repair is not fitted to are used.
        settings: how to prune.
        engine: where and in what to compute.

    Raises:
        UnsupportedModelError: the blocks are mixtures of experts.
        UsageError: the model does not fit into memory.
    """
    if not settings.search_rounds:
        return widths
    check_can_be_masked(source.family)
    score_F_of_L = _scores(source, statistics, settings.criterion)
    model = load_whole(source, engine, "--search")
    held_out_NT = windows.tokens_NT[is_held_out(len(windows.tokens_NT))]
    total = settings.search_rounds * len(held_out_NT) * len(score_F_of_L)
    with item_progress("search", total, "pass") as bar:
        found = search_widths(
            model,
            held_out_NT,
            lambda block, width: strongest_channels(score_F_of_L[block], width),
            widths.kept_L,
            settings.budget.multiple_for([len(score_F) for score_F in score_F_of_L]),
            settings.search_rounds,
            bar.update,
        )
    return replace(widths, kept_L=found.kept_L, search=found)


def calibration_windows(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    text: CalibrationText,
    compute: Compute,
) -> Windows:
    """Draw the calibration windows; the model may write some itself."""
    return text.draw(tokenizer, partial(write_own_text, source, tokenizer, compute.engine(source)))


def write_own_text(
    source: WeightSource,
    tokenizer: PreTrainedTokenizerBase,
    engine: Engine,
    *,
    count: int,
    seqlen: int,
    seed: int,
) -> Tensor:
    """Let the model write windows of text; see `cfsp.whole_model.own_text`.

    Raises:
        UsageError: the model does not fit into memory.
        TextError: the model has no token that a text begins after.
        CalibrationError: the model predicts NaN.
    """
    # Before anything is written: can the model read texts so long?
    check_tokens(source.config, torch.zeros(1, seqlen, dtype=torch.int64), source.label)
    model = load_whole(source, engine, "--data self")
    first = first_token(model, tokenizer)
    return own_windows(model, first, count=count, seqlen=seqlen, seed=seed)


def _scores(source: WeightSource, statistics: Statistics, criterion: Criterion) -> list[Tensor]:
    """Return the channel scores of every block of a model without experts."""
    assert source.family.experts is None
    return [
        next(iter(ffn_scores(source, block, observed, criterion)))
        for block, observed in enumerate(statistics.blocks)
    ]

"""Prune as much as fits into a loss: plans from one calibration, tried with channels masked."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import Checkpoint
from cfsp.engine.compute import engine_of
from cfsp.errors import BudgetError
from cfsp.goals.resolution import Attempt, Resolution
from cfsp.goals.search import budget_at, highest_step, last_that_holds
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.make import make_plan
from cfsp.planning.widths import model_size
from cfsp.quality.perplexity import perplexity
from cfsp.text.drawing import consecutive_windows, draw_left_over
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows
from cfsp.whole_model.load import load_whole
from cfsp.whole_model.masks import masked_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import CalibrationText, MaxLossIncrease, PruneSettings


def held_out_windows(
    goal: MaxLossIncrease, text: CalibrationText, tokenizer: PreTrainedTokenizerBase
) -> list[Windows]:
    """Return the windows that a loss is bounded on, text by text; calibration has none of them.

    Raises:
        TextError: a text is missing, or calibration takes all of it.
        UsageError: the calibration text has images, and no other is named.
    """
    if not goal.held_out:
        return [
            draw_left_over(
                text.names,
                tokenizer,
                samples=text.samples,
                seqlen=text.seqlen,
                seed=text.seed,
                count=goal.windows,
                bos=text.bos,
            )
        ]
    return [
        consecutive_windows(name, tokenizer, count=goal.windows, seqlen=text.seqlen, bos=text.bos)
        for name in goal.held_out
    ]


def loss_of(model: PreTrainedModel, texts: list[Windows], label: str) -> float:
    """Return the loss of a model in nats per token, the mean over texts."""
    losses = [math.log(perplexity(model, windows, label).value) for windows in texts]
    return sum(losses) / len(losses)


def loss_increase_of(
    directory: Path, goal: MaxLossIncrease, dense: float, settings: PruneSettings
) -> float:
    """Return how much the loss of a finished checkpoint is above the dense model's.

    It is measured on the windows of the bound, in nats per token.
    """
    texts = held_out_windows(goal, settings.text, load_tokenizer(directory))
    result = Checkpoint(directory)
    model = load_whole(result, engine_of(settings.compute, result), "measuring the loss")
    return loss_of(model, texts, "result") - dense


def resolve_loss(
    goal: MaxLossIncrease,
    source: WeightSource,
    model: PreTrainedModel,
    texts: list[Windows],
    statistics: Statistics,
    settings: PruneSettings,
) -> Resolution:
    """Return the largest sparsity whose loss, before repair, stays within the bound.

    Args:
        goal: the bound.
        source: the model.
        model: the same in memory.
        texts: windows to measure on.
        statistics: of the calibration.
        settings: what counts as important, and the multiple.

    Raises:
        BudgetError: not even the smallest step fits.
    """
    size = model_size(source)
    dense = loss_of(model, texts, "dense")
    tried: list[Attempt] = []

    def holds(step: int) -> bool:
        budget = budget_at(step, settings.budget)
        plan = make_plan(source, statistics, budget, settings.criterion)
        label = f"{budget.sparsity:.1%} pruned"
        losses = [masked_loss(source, model, plan, windows, label) for windows in texts]
        increase = sum(losses) / len(losses) - dense
        parameters = size.parameters_with(plan.kept_widths)
        tried.append(Attempt(budget.sparsity, parameters, increase, increase <= goal.nats))
        return tried[-1].fits

    highest = highest_step(size, settings.budget)
    chosen = last_that_holds(highest, holds)
    if chosen == 0:
        least = min(tried, key=lambda entry: entry.sparsity)
        channels = channels_in_words(settings.budget.parts)
        raise BudgetError(
            f"the loss cannot stay within {goal.nats:g} nats per token of the dense model's "
            f"{dense:.3f}: already {least.sparsity:.1%} of the {channels} cost "
            f"{least.value:.3f}; allow more, "
            "or calibrate on text like that it is measured on"
        )
    return Resolution(
        budget_at(chosen, settings.budget),
        "max_loss_increase",
        goal.nats,
        tuple(tried),
        {
            "dense_loss": round(dense, 6),
            "held_out": {name: n for windows in texts for name, n in windows.sources.items()},
            "tokens_digests": [windows.digest for windows in texts],
            "repair": "measured before any",
        },
    )

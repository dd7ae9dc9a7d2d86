"""What is said before any work: how small the model becomes, and where that is worth little."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from cfsp.checkpoint.reading import WeightSource, parameter_count
from cfsp.planning.allocation import channels_in_words
from cfsp.selection.constraint import parameters_to_go
from cfsp.settings import DEFAULT_SAMPLES, PruneSettings, TargetParameters

# Of the share that was asked for, which goes of the model where most of it is elsewhere.
_LITTLE = 1 / 3
# Below so many parameters a model lost about twice as much: without 20% of their channels
# SmolLM2-135M has 1.27 times the perplexity and Qwen2.5-Coder-0.5B 1.15 (docs/RESULTS.md).
_SMALL = 300e6
# Of a small model, which goes without a word.
_HARMLESS = 0.05
# Fewer windows repair less well (docs/RESULTS.md, foreign text).
_FEW_WINDOWS = 64

log = logging.getLogger(__name__)


def announce(source: WeightSource, settings: PruneSettings) -> None:
    """Say what a pruning will come to, and where it is worth little."""
    if size := size_in_words(source, settings):
        log.info("%s", size)
    for doubt in doubts(source, settings):
        log.warning("%s", doubt)


def size_after(source: WeightSource, settings: PruneSettings) -> tuple[int, int] | None:
    """Return parameters and bytes of what is left, before widths are rounded to multiples.

    None where only the work says how much goes.
    """
    before, budget, goal = parameter_count(source), settings.budget, settings.goal
    if isinstance(goal, TargetParameters):
        after = round(before * goal.fraction)
    elif goal is None and budget.sparsity and "experts" not in budget.parts:
        after = before - round(parameters_to_go(source, budget))
    else:
        return None
    stored = sum(spec.nbytes for spec in source.specs.values())
    return after, round(stored * after / before)


def size_in_words(source: WeightSource, settings: PruneSettings) -> str:
    """Return parameters and gigabytes before and after; nothing where only the work says them."""
    if (size := size_after(source, settings)) is None:
        return ""
    after, stored = size
    before = parameter_count(source)
    return (
        f"{before / 1e6:,.1f}M parameters -> about {after / 1e6:,.1f}M "
        f"({after / before - 1:+.1%}), {stored / 1e9:.2f} GB of weights"
    )


def doubts(source: WeightSource, settings: PruneSettings) -> Iterator[str]:
    """Yield a sentence for each reason why pruning like this may be worth little."""
    budget, asked, every = settings.budget, settings.budget.sparsity, parameter_count(source)
    if settings.goal is None and "ffn" in budget.parts:
        gone = parameters_to_go(source, budget)
        if gone < _LITTLE * asked * every:
            yield (
                f"{asked:.0%} of the {channels_in_words(budget.parts)} are {gone / every:.1%} of "
                f"this model's parameters ({gone / 1e6:,.1f}M of {every / 1e6:,.1f}M), most of "
                "which are elsewhere, as in its vocabulary; for a smaller model give "
                f"--target-params {1 - asked:.2g}, name more --parts, or quantise it"
            )
    size = size_after(source, settings)
    if size is not None and every < _SMALL and size[0] < (1 - _HARMLESS) * every:
        yield (
            f"a model of {every / 1e6:,.0f}M parameters has little to spare: it loses about twice "
            "as much as one of 500M; 8-bit weights cost less, and `cfsp recover` wins back some "
            "of it"
        )
    windows = settings.text.windows
    if settings.repair != "none" and windows < _FEW_WINDOWS:
        yield (
            f"{windows} windows calibrate and repair, by default {DEFAULT_SAMPLES}: "
            "SmolLM2-135M without a fifth of its channels had 1.45 times the dense perplexity by 8 "
            "windows, 1.33 by 16, 1.30 by 32 and 1.27 by 128"
        )

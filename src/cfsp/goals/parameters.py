"""The share of all parameters that a goal leaves, and what may go to come there."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import parameter_count
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.numbers_to_try import parameters_to_go
from cfsp.planning.removal import check_can_go
from cfsp.planning.removal_budget import RemovalBudget
from cfsp.planning.widths import NOTHING
from cfsp.repair.trial import has_room_for_two
from cfsp.settings import AUTO_METRIC, DEFAULT_PARTS, DIVERGENCE, Part

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.settings import Budget, PruneSettings, TargetParameters
    from cfsp.text.windows import Windows

# From about this share of the FFN channels on, whole blocks beside fewer channels were better on
# one of two models: not at 29% or 33%, but at 43% (docs/STUDIES.md, study 9).
MANY_CHANNELS = 0.4

# Of the share that was asked for, which goes of the model where most of it is elsewhere.
_LITTLE = 1 / 3

log = logging.getLogger(__name__)


def budget_for_parameters(goal: TargetParameters, budget: Budget) -> Budget:
    """Return the budget by which as many of all parameters go as the goal says."""
    # Rounded, so that 0.7 that stay are 0.3 that go.
    return replace(budget, sparsity=round(1 - goal.fraction, 12), of="model")


def little_in_words(source: WeightSource, budget: Budget) -> str:
    """Return a sentence if FFN channels own so little that few parameters go; else nothing."""
    asked, every = budget.sparsity, parameter_count(source)
    gone = parameters_to_go(source, budget)
    if budget.of == "model" or "ffn" not in budget.parts or gone >= _LITTLE * asked * every:
        return ""
    return (
        f"{asked:.0%} of the {channels_in_words(budget.parts)} are {gone / every:.1%} of this "
        f"model's parameters ({gone / 1e6:,.1f}M of {every / 1e6:,.1f}M), most of which are "
        f"elsewhere, as in its vocabulary; for a smaller model give --target-params "
        f"{1 - asked:.2g}, name more --parts, or quantise it"
    )


def parts_to_try(
    source: WeightSource,
    budget: Budget,
    share: float,
    settings: PruneSettings,
    engine: Engine,
    windows: Windows,
) -> tuple[Part, ...]:
    """Return what may go where nobody said it and many FFN channels would go: blocks too.

    How many blocks go is then tried after repair, with the model and a pruned one in memory. Where
    that is impossible, FFN channels go alone. People are told.

    Args:
        source: the model.
        budget: how many of its parameters go.
        share: of the FFN channels that goes if only they do; 1 or more where all are not enough.
        settings: by what blocks would be chosen.
        engine: where and in what to compute.
        windows: the calibration text.

    Raises:
        BudgetError: neither channels nor blocks own so much.
    """
    if share < 1:
        would = f"{share:.0%} of the FFN channels would go alone"
    else:
        would = "all FFN channels would not be enough"
        RemovalBudget.of(source, _of_blocks(budget))  # nor may blocks be
    if obstacle := _obstacle(source, budget, settings, engine, windows):
        log.info("%s, and %s: whole blocks are not tried beside them", would, obstacle)
        return DEFAULT_PARTS
    log.info("%s: whole blocks are tried beside them; --parts ffn does without", would)
    return (*DEFAULT_PARTS, "blocks")


def _obstacle(
    source: WeightSource,
    budget: Budget,
    settings: PruneSettings,
    engine: Engine,
    windows: Windows,
) -> str:
    """Return why it cannot be tried how many blocks go; nothing if it can."""
    if settings.criterion.removal not in (AUTO_METRIC, DIVERGENCE):
        return f"--set removal={settings.criterion.removal} compares no predictions"
    if not has_room_for_two(source, engine):
        return "there is no memory for a pruned model beside the dense one"
    if windows.has_images:
        return "the text has images"
    return "" if _can_lose_blocks(source, budget) else "the model cannot do without enough of them"


def _can_lose_blocks(source: WeightSource, budget: Budget) -> bool:
    """Return whether a model can do without a block, and without as many as the budget takes."""
    try:
        wanted = RemovalBudget.of(source, _of_blocks(budget))
        candidates = wanted.sizes.candidates(NOTHING)
        removed = NOTHING
        for candidate in candidates[1:]:
            if wanted.has_room_for(removed, candidate):
                removed = removed.plus(candidate)
        if not removed.blocks:
            return False  # it has one block
        for some in (NOTHING.plus(candidates[-1]), removed):
            check_can_go(source, some)
    except (BudgetError, UnsupportedModelError):
        return False
    return True


def _of_blocks(budget: Budget) -> Budget:
    """Return the budget by which blocks alone go."""
    return replace(budget, parts=("blocks",))

"""The share of all parameters that a goal leaves, and what may go to come there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.planning.removal import check_can_go
from cfsp.planning.removal_budget import RemovalBudget, RemovedWhole
from cfsp.planning.widths import model_size
from cfsp.repair.trial import has_room_for_two
from cfsp.settings import DEFAULT_PARTS, Part
from cfsp.whole_model.removal_order import follow_divergence

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.settings import Budget, PruneSettings, TargetParameters
    from cfsp.text.windows import Windows

# From this share of the FFN channels on, whole blocks beside fewer channels were better on one of
# two models (docs/STUDIES.md, study 9).
MANY_CHANNELS = 0.4

log = logging.getLogger(__name__)


def budget_for_parameters(goal: TargetParameters, budget: Budget) -> Budget:
    """Return the budget by which as many of all parameters go as the goal says."""
    # Rounded, so that 0.7 that stay are 0.3 that go.
    return replace(budget, sparsity=round(1 - goal.fraction, 12), of="model")


def parts_to_try(
    source: WeightSource,
    budget: Budget,
    settings: PruneSettings,
    engine: Engine,
    draw: Callable[[], Windows],
) -> tuple[Part, ...]:
    """Return what may go where nobody said it: FFN channels, and whole blocks if many would go.

    How many blocks go is then tried after repair, with the model and a pruned one in memory. Where
    that is impossible, FFN channels go alone.

    Args:
        source: the model.
        budget: how many of its parameters go.
        settings: by what blocks would be chosen.
        engine: where and in what to compute.
        draw: gives the calibration windows; called only if there is memory for the trial.
    """
    ffns = model_size(source).of_parts(DEFAULT_PARTS)
    owned = ffns.cost_of(ffns.width_U) * ffns.parameters_per_cost
    share = budget.sparsity * ffns.parameters / owned
    if (
        share < MANY_CHANNELS
        or not follow_divergence(source, settings.criterion, engine)
        or not has_room_for_two(source, engine)
        or draw().has_images
        or not _can_lose_blocks(source, budget)
    ):
        return DEFAULT_PARTS
    if share < 1:
        why = f"{share:.0%} of the FFN channels would go alone"
    else:
        why = "all FFN channels would not be enough"
    log.info("%s: whole blocks are tried beside them; --parts ffn does without", why)
    return (*DEFAULT_PARTS, "blocks")


def _can_lose_blocks(source: WeightSource, budget: Budget) -> bool:
    """Return whether a model can do without a block, and without as many as the budget takes."""
    try:
        wanted = RemovalBudget.of(source, replace(budget, parts=("blocks",)))
        none = RemovedWhole()
        candidates = wanted.sizes.candidates(none)
        removed = none
        for candidate in candidates[1:]:
            if wanted.has_room_for(removed, candidate):
                removed = removed.plus(candidate)
        for some in (none.plus(candidates[-1]), removed):
            check_can_go(source, some)
    except (BudgetError, UnsupportedModelError):
        return False
    return True

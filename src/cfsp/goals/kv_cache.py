"""Keep a fraction of the KV cache, by KV groups, whole attentions, or both."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.errors import BudgetError
from cfsp.goals.resolution import Resolution
from cfsp.planning.numbers_to_try import Aim, half_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.planning.removal_budget import RemovedWhole
    from cfsp.settings import Budget, Part, PruneSettings, TargetKVCache


def resolve_kv_cache(
    goal: TargetKVCache, source: WeightSource, settings: PruneSettings
) -> Resolution:
    """Return the budget that leaves a fraction of the KV groups; nothing needs to be tried.

    Where attentions go with KV groups the number of them stays open; see `aim_at_kv_cache`.

    Raises:
        BudgetError: attentions would be left without any, or none would be left.
    """
    widths = [unit.width for unit in source.units if unit.part == "kv"]
    groups, stay = sum(widths), _groups_that_stay(goal, source)
    budget = settings.budget
    facts = {"groups_before": groups}
    if "attention" in budget.parts:
        least = 1 if "kv" in budget.parts else max(widths)
        who, instead = f"at least {least} of the KV groups stays", ""
    else:
        least, who = len(widths), f"each of the {len(widths)} attentions keeps one of its KV groups"
        instead = "; whole attentions go too with --parts kv,attention"
    if stay < least:
        raise BudgetError(
            f"{who}, so --target-kv-cache must be at least "
            f"{math.ceil(1000 * least / groups) / 1000:g}, found {goal.fraction:g}{instead}"
        )
    if budget.leaves_number_open:
        # What `aim_at_kv_cache` says instead of a sparsity.
        return Resolution(budget, "target_kv_cache", goal.fraction, (), facts)
    if budget.parts == ("attention",):
        # Enough whichever go: as if they were those with the fewest.
        ascending = sorted(widths)
        gone = next(n for n in range(len(widths)) if sum(ascending[n:]) <= stay)
        budget = replace(budget, remove_attentions=gone)
        return Resolution(budget, "target_kv_cache", goal.fraction, (), facts)
    # The rest goes; rounded, so that a half that stays is a half that goes.
    budget = replace(budget, sparsity=round(1 - stay / groups, 12))
    return Resolution(budget, "target_kv_cache", goal.fraction, (), facts)


def _groups_that_stay(goal: TargetKVCache, source: WeightSource) -> int:
    groups = sum(unit.width for unit in source.units if unit.part == "kv")
    return math.floor(goal.fraction * groups + 1e-9)


def aim_at_kv_cache(goal: TargetKVCache, source: WeightSource, budget: Budget) -> Aim:
    """Return the aim that as many KV groups stay, whatever number of attentions goes."""
    stay = _groups_that_stay(goal, source)

    def share(_: Statistics, parts: Sequence[Part], removed: RemovedWhole) -> float:
        groups = [
            unit.width for unit in source.units if unit.part == "kv" and not removed.takes(unit)
        ]
        return max(0.0, 1 - stay / sum(groups)) if stay >= len(groups) else 1.0

    return Aim({0: half_alone(budget)}, share)

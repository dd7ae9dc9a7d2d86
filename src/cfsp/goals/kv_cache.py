"""Keep a fraction of the KV cache, by KV groups, whole attentions, or both.

A group caches as many tokens as its attention looks back: all of a context, or a sliding window.
The context is the longest that the model reads. Where all groups cache as many, the fraction is one
of groups; else the least that is enough is found by planning, which statistics are needed for.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cfsp.checkpoint.text_config import longest_input_of, text_config_of
from cfsp.errors import BudgetError
from cfsp.goals.resolution import Resolution
from cfsp.goals.search import last_that_holds
from cfsp.planning.numbers_to_try import Aim, half_alone
from cfsp.planning.removal_budget import with_counts
from cfsp.planning.widths import NOTHING, plan_widths

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.planning.removal_budget import RemovedWhole
    from cfsp.settings import Budget, Part, PruneSettings, TargetKVCache

# Of models that name no longest input.
_CONTEXT = 8192

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KVCache:
    """What the attentions of a model cache of one long context.

    Attributes:
        context: its tokens.
        tokens: how many of them a group caches, for every unit of the model; 0 of FFNs.
        groups: of every unit; 0 of FFNs.
    """

    context: int
    tokens: tuple[int, ...]
    groups: tuple[int, ...]

    @classmethod
    def of(cls, source: WeightSource) -> KVCache:
        """Return the cache of a model, of its longest context."""
        config = text_config_of(source.config)
        context = longest_input_of(source.config) or _CONTEXT
        kinds = getattr(config, "layer_types", None)
        windows = {
            "sliding_attention": getattr(config, "sliding_window", None),
            "chunked_attention": getattr(config, "attention_chunk_size", None),
        }
        tokens = []
        for unit in source.units:
            window = windows.get(kinds[unit.block] if kinds else "sliding_attention") or context
            tokens.append(min(context, window) if unit.part == "kv" else 0)
        groups = tuple(unit.width if unit.part == "kv" else 0 for unit in source.units)
        return cls(context, tuple(tokens), groups)

    @property
    def is_even(self) -> bool:
        """Whether all groups cache as many tokens."""
        return len({*self.tokens} - {0}) == 1

    def size(self, kept_U: Sequence[int]) -> int:
        """Return the tokens that all groups cache together if units keep so many."""
        return sum(kept * tokens for kept, tokens in zip(kept_U, self.tokens, strict=True))


def is_known_beforehand(source: WeightSource, budget: Budget) -> bool:
    """Return whether what is to go for a KV cache follows without statistics."""
    return KVCache.of(source).is_even and not budget.leaves_number_open


def resolve_kv_cache(
    goal: TargetKVCache, source: WeightSource, settings: PruneSettings
) -> Resolution:
    """Return the budget that leaves a fraction of the KV cache, where that is known beforehand.

    Else it stays open; see `budget_for_kv_cache` and `aim_at_kv_cache`.

    Raises:
        BudgetError: attentions would be left without any, or none would be left.
    """
    cache, budget = KVCache.of(source), settings.budget
    whole, stay = cache.size(cache.groups), _stay(goal, cache)
    facts = {"groups_before": sum(cache.groups), "context": cache.context}
    widths = sorted(filter(None, cache.groups))
    if budget.parts == ("attention",) and not cache.is_even:
        raise BudgetError(
            "attentions of this model cache unequally (sliding windows), so how many have to go "
            "depends on which; give --parts kv,attention, found --parts attention"
        )
    if "attention" in budget.parts:
        groups = 1 if "kv" in budget.parts else max(widths)
        least = groups * min(filter(None, cache.tokens))
        who, instead = f"at least {groups} of the KV groups stays", ""
    else:
        least = sum(cache.tokens)
        who = f"each of the {len(widths)} attentions keeps one of its KV groups"
        instead = "; whole attentions go too with --parts kv,attention"
    if stay < least:
        raise BudgetError(
            f"{who}, so --target-kv-cache must be at least "
            f"{math.ceil(1000 * least / whole) / 1000:g}, found {goal.fraction:g}{instead}"
        )
    if not cache.is_even:
        log.info("the KV cache is counted at a context of %s tokens", f"{cache.context:,}")
    if is_known_beforehand(source, budget):
        if budget.parts == ("attention",):
            # Enough whichever go: as if they were those with the fewest.
            most = stay / max(cache.tokens)
            gone = next(n for n in range(len(widths)) if sum(widths[n:]) <= most)
            budget = replace(budget, remove_attentions=gone)
        else:
            # The rest goes; rounded, so that a half that stays is a half that goes.
            budget = replace(budget, sparsity=round(1 - stay / whole, 12))
    return Resolution(budget, "target_kv_cache", goal.fraction, (), facts)


def _stay(goal: TargetKVCache, cache: KVCache) -> int:
    """Return how much of the cache stays at most: of an even one whole groups."""
    unit = max(cache.tokens) if cache.is_even else 1
    return unit * math.floor(goal.fraction * cache.size(cache.groups) / unit + 1e-9)


def budget_for_kv_cache(
    goal: TargetKVCache, source: WeightSource, settings: PruneSettings, statistics: Statistics
) -> Budget:
    """Return the least budget of KV groups that is enough by its plan."""
    cache = KVCache.of(source)
    share = _share_of_groups(cache, _stay(goal, cache), source, settings)
    return replace(settings.budget, sparsity=share(statistics, ("kv",), NOTHING))


def _kept(cache: KVCache, source: WeightSource, removed: RemovedWhole) -> list[int]:
    """Return the groups of every unit beside what goes whole."""
    pairs = zip(source.units, cache.groups, strict=True)
    return [0 if removed.takes(unit) else groups for unit, groups in pairs]


def aim_at_kv_cache(goal: TargetKVCache, source: WeightSource, settings: PruneSettings) -> Aim:
    """Return the aim that as much of the cache stays, whatever number of attentions goes."""
    cache = KVCache.of(source)
    share = _share_of_groups(cache, _stay(goal, cache), source, settings)
    return Aim({0: half_alone(settings.budget)}, share)


def _share_of_groups(
    cache: KVCache, stay: int, source: WeightSource, settings: PruneSettings
) -> Callable[[Statistics, Sequence[Part], RemovedWhole], float]:
    """Return what says which share of the KV groups goes beside attentions; see `Aim`."""

    def share(seen: Statistics, parts: Sequence[Part], removed: RemovedWhole) -> float:
        left_U = _kept(cache, source, removed)
        left = sum(left_U)
        if cache.size([min(1, groups) for groups in left_U]) > stay:
            return 1.0
        if cache.is_even:
            return max(0.0, 1 - stay / cache.size(left_U))
        budget = with_counts(settings.budget, removed)

        def is_too_much(gone: int) -> bool:
            asked = replace(budget, sparsity=gone / left)
            return stay < cache.size(
                plan_widths(source, seen, asked, settings.criterion, removed).kept_U
            )

        # At 0 it may be enough: what goes whole is gone already.
        if not is_too_much(0):
            return 0.0
        return (last_that_holds(left - sum(map(bool, left_U)), is_too_much) + 1) / left

    return share

"""Keep a fraction of the KV cache, by KV groups, whole attention layers, or both.

A group caches as many tokens as its attention looks back: all of a context, or a sliding window.
The context is the longest that the model reads. Where all groups cache as many, the fraction is one
of groups; else the least that is enough is found by planning, which statistics are needed for.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.text_config import longest_input_of, text_config_of
from cfsp.errors import BudgetError
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.selection.bisection import last_that_holds
from cfsp.selection.constraint import Constraint
from cfsp.selection.drop_budget import DropBudget

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.planning.make import Planner
    from cfsp.settings import Part

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


@dataclass(frozen=True)
class CacheFraction(Constraint):
    """A fraction of the KV cache of the longest context stays at most.

    Attributes:
        asked: the fraction.
    """

    asked: float

    name = "target_kv_cache"

    @property
    def needs_statistics(self) -> bool:
        """Whether what goes follows from a plan alone."""
        return not self.cache.is_even or len(self.budget.parts) > 1

    @cached_property
    def cache(self) -> KVCache:
        """The cache of the whole model."""
        return KVCache.of(self.source)

    @cached_property
    def stay(self) -> int:
        """How much of the cache stays at most: of an even one whole groups."""
        unit = max(self.cache.tokens) if self.cache.is_even else 1
        return unit * math.floor(self.asked * self.cache.size(self.cache.groups) / unit + 1e-9)

    def check(self) -> None:
        """Check that so little can stay.

        Raises:
            BudgetError: attentions would be left without any group, or none would be left.
        """
        cache, parts = self.cache, self.budget.parts
        whole = cache.size(cache.groups)
        widths = sorted(filter(None, cache.groups))
        if parts == ("attention",) and not cache.is_even:
            raise BudgetError(
                "attention layers of this model cache unequally (sliding windows), so how many "
                "have to go depends on which; give --parts kv,attention, found --parts attention"
            )
        if "attention" in parts:
            groups = 1 if "kv" in parts else max(widths)
            least = groups * min(filter(None, cache.tokens))
            who, instead = f"at least {groups} of the KV groups stays", ""
        else:
            least = sum(cache.tokens)
            who = f"each of the {len(widths)} attention layers keeps one of its KV groups"
            instead = "; whole attention layers go too with --parts kv,attention"
        if self.stay < least:
            raise BudgetError(
                f"{who}, so --target-kv-cache must be at least "
                f"{math.ceil(1000 * least / whole) / 1000:g}, found {self.asked:g}{instead}"
            )
        if not cache.is_even:
            log.info("the KV cache is counted at a context of %s tokens", f"{cache.context:,}")
        super().check()

    def to_drop(self) -> DropBudget:
        """Return how many attentions are enough, whichever go; beside groups half of them."""
        if len(self.budget.parts) > 1:
            return super().to_drop()
        # Enough whichever go: as if they were those with the fewest groups.
        widths = sorted(filter(None, self.cache.groups))
        most = self.stay / max(self.cache.tokens)
        gone = next(n for n in range(len(widths)) if sum(widths[n:]) <= most)
        return DropBudget.of_count(self.source, "attention", gone, self.budget.keep)

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the least share of the KV groups that is enough."""
        cache = self.cache
        pairs = zip(self.source.units, cache.groups, strict=True)
        left_U = [0 if dropped.takes(unit) else groups for unit, groups in pairs]
        left = sum(left_U)
        if cache.size([min(1, groups) for groups in left_U]) > self.stay:
            return None
        if cache.is_even:
            # Rounded, so that a half that stays is a half that goes.
            return max(0.0, round(1 - self.stay / cache.size(left_U), 12))

        def is_too_much(gone: int) -> bool:
            candidate = Candidate(dropped, 0, ("kv",), gone / left)
            return self.stay < cache.size(planner.widths(candidate).kept_U)

        # At 0 it may be enough: what goes whole is gone already.
        if not is_too_much(0):
            return 0.0
        return (last_that_holds(left - sum(map(bool, left_U)), is_too_much) + 1) / left

    def facts(self) -> dict[str, Any]:
        """Return what was asked for."""
        groups, context = sum(self.cache.groups), self.cache.context
        conditions = {"groups_before": groups, "context": context}
        return {"goal": self.name, "asked": self.asked, "tried": [], "conditions": conditions}

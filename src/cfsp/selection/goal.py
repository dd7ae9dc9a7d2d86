"""From what was asked for to a constraint and to what may go for it; a fraction of the cache."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import mul
from typing import Any

from cfsp.calibration.statistics import Removal
from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.text_config import longest_input_of, text_config_of
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.job import Job
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.make import Planner, parameters_of_channels
from cfsp.selection.constraint import (
    Constraint,
    DropBudget,
    Parameters,
    Share,
    last_that_holds,
)
from cfsp.selection.drop_order import check_can_go
from cfsp.selection.loss import LossIncrease, held_out_windows
from cfsp.selection.search import has_room_for_two
from cfsp.selection.speedup import Speedup
from cfsp.settings import (
    DEFAULT_PARTS,
    Part,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
)
from cfsp.streaming.work_dir import load_or_compute

# From about this share of the FFN channels on, whole blocks beside fewer channels were better on
# one of two models: not at 29% or 33%, but at 43% (docs/STUDIES.md, study 9).
MANY_CHANNELS = 0.4
# Of models that name no longest input.
_CONTEXT = 8192

log = logging.getLogger(__name__)


def constraint_of(job: Job) -> tuple[Job, Constraint]:
    """Return what candidates have to meet, and the job with the parts that may go for it.

    It is checked before a forward pass. Windows are drawn only where that says which parts may go;
    models are timed for a speed.
    """
    source, budget, goal = job.source, job.budget, job.settings.goal
    constraint: Constraint
    if goal is None:
        constraint = Share(source, budget)
    elif isinstance(goal, TargetParameters):
        asked = Parameters(source, budget, goal.fraction)
        budget = replace(budget, parts=_parts_for(job, asked))
        job = replace(job, settings=replace(job.settings, budget=budget))
        constraint = replace(asked, budget=budget)
    elif isinstance(goal, TargetKVCache):
        constraint = CacheFraction(source, budget, goal.fraction)
    elif isinstance(goal, TargetSpeedup):
        constraint = Speedup(source, budget, goal, job.runtime, job.work_dir)
    else:
        # Too little text should be found out before the calibration.
        held_out = held_out_windows(job.settings.text, job.tokenizer())
        constraint = LossIncrease(source, budget, goal, held_out, job.runtime, job.work_dir)
    constraint.check()
    return job, constraint


def _parts_for(job: Job, asked: Parameters) -> tuple[Part, ...]:
    """Return what may go; where nobody said it and many FFN channels would go, blocks too.

    How many blocks go is then tried after repair, with the model and a pruned one in memory. Where
    that is impossible, FFN channels go alone. People are told.
    """
    if not job.settings.leaves_parts_open:
        return job.budget.parts
    gone = asked.share_of_all * parameter_count(job.source)
    share = gone / parameters_of_channels(job.source, DEFAULT_PARTS)
    if share < MANY_CHANNELS:
        return DEFAULT_PARTS
    if share < 1:
        would = f"{share:.0%} of the FFN channels would go alone"
    else:
        would = "all FFN channels would not be enough"
        _of_blocks(asked)  # nor may blocks be
    job.draw()  # in every process: they compare what they drew

    def choose() -> dict[str, Any]:
        if obstacle := _obstacle(job, asked):
            log.info("%s, and %s: whole blocks are not tried beside them", would, obstacle)
            return {"parts": DEFAULT_PARTS}
        log.info("%s: whole blocks are tried beside them; --parts ffn does without", would)
        return {"parts": (*DEFAULT_PARTS, "blocks")}

    # A run that is resumed may find another amount of memory.
    found = job.work_dir.team.from_first(lambda: load_or_compute(job.work_dir, "parts", choose))
    return tuple(found["parts"])


def _obstacle(job: Job, asked: Parameters) -> str:
    """Return why it cannot be tried how many blocks go; nothing if it can."""
    if not has_room_for_two(job.source, job.runtime):
        return "there is no memory for a pruned model beside the dense one"
    if job.draw().has_images:
        return "the text has images"
    try:
        wanted = _of_blocks(asked)
        *others, last = sorted(wanted.sizes.block_of)
        # As many as would go alone, but for the first; none of a model with one block.
        if not (gone := wanted.first([Removal(block, 0.0) for block in (*others[1:], last)])):
            raise UnsupportedModelError
        for some in (Dropped((last,)), Dropped.of(gone)):
            check_can_go(job.source, some)
    except (BudgetError, UnsupportedModelError):
        return "the model cannot do without enough of them"
    return ""


def _of_blocks(asked: Parameters) -> DropBudget:
    return replace(asked, budget=replace(asked.budget, parts=("blocks",))).to_drop()


@dataclass(frozen=True)
class CacheFraction(Constraint):
    """A fraction of the KV cache of the longest context stays at most.

    A group caches as many tokens as its attention looks back: all of a context, or a sliding
    window. Where all groups cache as many, the fraction is one of groups; else the least that is
    enough is found by planning, which statistics are needed for.
    """

    asked: float

    name = "target_kv_cache"

    @property
    def needs_statistics(self) -> bool:
        """Whether what goes follows from a plan alone."""
        return not self._is_even or len(self.budget.parts) > 1

    @cached_property
    def context(self) -> int:
        """The tokens of the longest context."""
        return longest_input_of(self.source.config) or _CONTEXT

    @cached_property
    def tokens_U(self) -> list[int]:
        """How many of these a group of every unit caches; 0 of FFNs."""
        config = text_config_of(self.source.config)
        kinds = getattr(config, "layer_types", None)
        windows = {
            "sliding_attention": getattr(config, "sliding_window", None),
            "chunked_attention": getattr(config, "attention_chunk_size", None),
        }
        found = []
        for unit in self.source.units:
            window = windows.get(kinds[unit.block] if kinds else "sliding_attention")
            found.append(min(self.context, window or self.context) if unit.part == "kv" else 0)
        return found

    @cached_property
    def groups_U(self) -> list[int]:
        """The KV groups of every unit; 0 of FFNs."""
        return [unit.width if unit.part == "kv" else 0 for unit in self.source.units]

    @property
    def _is_even(self) -> bool:
        """Whether all groups cache as many tokens."""
        return len({*self.tokens_U} - {0}) == 1

    def size(self, kept_U: Sequence[int]) -> int:
        """Return the tokens that all groups cache together if units keep so many."""
        return sum(map(mul, kept_U, self.tokens_U))

    @cached_property
    def stay(self) -> int:
        """How much of the cache stays at most: of an even one whole groups."""
        unit = max(self.tokens_U) if self._is_even else 1
        return unit * math.floor(self.asked * self.size(self.groups_U) / unit + 1e-9)

    def check(self) -> None:
        """Check that so little can stay."""
        parts, widths = self.budget.parts, sorted(filter(None, self.groups_U))
        if parts == ("attention",) and not self._is_even:
            raise BudgetError(
                "attention layers of this model cache unequally (sliding windows), so how many "
                "have to go depends on which; give --parts kv,attention, found --parts attention"
            )
        if "attention" in parts:
            groups = 1 if "kv" in parts else max(widths)
            least = groups * min(filter(None, self.tokens_U))
            who, instead = f"at least {groups} of the KV groups stays", ""
        else:
            least = sum(self.tokens_U)
            who = f"each of the {len(widths)} attention layers keeps one of its KV groups"
            instead = "; whole attention layers go too with --parts kv,attention"
        if self.stay < least:
            raise BudgetError(
                f"{who}, so --target-kv-cache must be at least "
                f"{math.ceil(1000 * least / self.size(self.groups_U)) / 1000:g}, found "
                f"{self.asked:g}{instead}"
            )
        if not self._is_even:
            log.info("the KV cache is counted at a context of %s tokens", f"{self.context:,}")
        super().check()

    def to_drop(self) -> DropBudget:
        """Return how many attentions are enough, whichever go; beside groups half of them."""
        if len(self.budget.parts) > 1:
            return super().to_drop()
        # Enough whichever go: as if they were those with the fewest groups.
        widths = sorted(filter(None, self.groups_U))
        most = self.stay / max(self.tokens_U)
        gone = next(n for n in range(len(widths)) if sum(widths[n:]) <= most)
        return DropBudget.of_count(self.source, "attention", gone, self.budget.keep)

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the least share of the KV groups that is enough."""
        pairs = zip(self.source.units, self.groups_U, strict=True)
        left_U = [0 if dropped.takes(unit) else groups for unit, groups in pairs]
        left = sum(left_U)
        if self.size([min(1, groups) for groups in left_U]) > self.stay:
            return None
        if self._is_even:
            # Rounded, so that a half that stays is a half that goes.
            return max(0.0, round(1 - self.stay / self.size(left_U), 12))

        def is_too_much(gone: int) -> bool:
            candidate = Candidate(dropped, 0, ("kv",), gone / left)
            return self.stay < self.size(planner.widths(candidate).kept_U)

        # At 0 it may be enough: what goes whole is gone already.
        if not is_too_much(0):
            return 0.0
        return (last_that_holds(left - sum(map(bool, left_U)), is_too_much) + 1) / left

    def facts(self) -> dict[str, Any]:
        """Return what was asked for."""
        conditions = {"groups_before": sum(self.groups_U), "context": self.context}
        return {"goal": self.name, "asked": self.asked, "tried": [], "conditions": conditions}

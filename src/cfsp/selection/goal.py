"""Goals as constraints: a fraction of the cache, a bound on the loss; and what may go for them."""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import mul
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import longest_input_of, text_config_of
from cfsp.errors import BudgetError
from cfsp.job import Job
from cfsp.planning.candidate import Candidate, Dropped, kept_by
from cfsp.planning.make import Planner, model_size
from cfsp.quality.perplexity import loss_in_memory
from cfsp.selection.constraint import (
    STEPS,
    Attempt,
    Constraint,
    DropBudget,
    Parameters,
    Share,
    highest_step,
)
from cfsp.selection.divergence import load_whole, masked_channels
from cfsp.selection.drop_order import can_go
from cfsp.selection.speedup import Speedup
from cfsp.settings import (
    DEFAULT_PARTS,
    CalibrationText,
    MaxLossIncrease,
    Part,
    PruneSettings,
    TargetKVCache,
    TargetParameters,
    TargetSpeedup,
    parts_in_words,
)
from cfsp.streaming.runtime import Runtime, runtime_of
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.drawing import draw_left_over
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows

# From about this share of the FFN channels on, whole blocks beside fewer channels were better on
# one of two models: not at 29% or 33%, but at 43% (docs/STUDIES.md, study 9).
MANY_CHANNELS = 0.4
HELD_OUT_WINDOWS = 12  # on which a loss is bounded
_CONTEXT = 8192  # of models that name no longest input

log = logging.getLogger(__name__)


def constraint_of(job: Job) -> tuple[Job, Constraint]:
    """Return what candidates have to meet, and the job with the parts that may go for it.

    It is checked before a forward pass; models are timed for a speed.
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
    gone = asked.share_of_all * job.source.parameter_count
    size = model_size(job.source, job.budget).of_parts(DEFAULT_PARTS)
    may_go = sum(unit.width * unit.channel_parameters for unit in size.units if not unit.stays)
    share = gone / may_go if may_go else math.inf
    if share < MANY_CHANNELS:
        return DEFAULT_PARTS
    parts: tuple[Part, ...] = (*DEFAULT_PARTS, "blocks")
    with_blocks = replace(asked, budget=replace(asked.budget, parts=parts))
    channels = "FFN channels that may go" if job.budget.keep else "FFN channels"
    if share < 1:
        would = f"{share:.0%} of the {channels} would go alone"
    else:
        would = f"all {channels} would not be enough"
        with_blocks.check()  # nor may blocks beside them be
    if obstacle := _obstacle(job, with_blocks.to_drop()):
        log.info("%s, and %s: whole blocks are not tried beside them", would, obstacle)
        return DEFAULT_PARTS
    log.info("%s: whole blocks are tried beside them; --parts ffn does without", would)
    return parts


def _obstacle(job: Job, wanted: DropBudget) -> str:
    """Return why it cannot be tried how many blocks go; nothing if it can."""
    if not job.fits(2):
        return "there is no memory for a pruned model beside the dense one"
    if any(can_go(job.source, wanted.dropped([block])) for block in sorted(wanted.room(()))):
        return ""
    return "the model cannot do without any block"


@dataclass(frozen=True)
class CacheFraction(Constraint):
    """A fraction of the KV cache of the longest context stays at most.

    A group caches as many tokens as its attention looks back (all of a context, or a sliding
    window), and of each as much as its heads are wide. Where all groups cache as much, the
    fraction is one of groups; else the least that is enough is found by planning, which
    statistics are needed for.
    """

    asked: float

    name = "target_kv_cache"

    @property
    def needs_statistics(self) -> bool:
        """Whether what goes follows from a plan alone."""
        return not self._is_arithmetic

    @cached_property
    def context(self) -> int:
        """The tokens of the longest context."""
        return longest_input_of(self.source.config) or _CONTEXT

    @cached_property
    def cached_U(self) -> list[int]:
        """How many keys, and values, a group of every unit caches; 0 of FFNs."""
        config = text_config_of(self.source.config)
        kinds = getattr(config, "layer_types", None)
        windows = {
            "sliding_attention": getattr(config, "sliding_window", None),
            "chunked_attention": getattr(config, "attention_chunk_size", None),
        }
        found = []
        for unit in self.source.units:
            window = windows.get(kinds[unit.block] if kinds else "sliding_attention")
            tokens = min(self.context, window or self.context)
            found.append(tokens * unit.head_size if unit.part == "kv" else 0)
        return found

    @cached_property
    def groups_U(self) -> list[int]:
        """The KV groups of every unit; 0 of FFNs."""
        return [unit.width if unit.part == "kv" else 0 for unit in self.source.units]

    @property
    def _is_even(self) -> bool:
        """Whether all groups cache as much."""
        return len({*self.cached_U} - {0}) == 1

    @property
    def _is_arithmetic(self) -> bool:
        """Whether a share of what groups own is one of the cache, and none is rounded up."""
        groups = model_size(self.source).of_parts(("kv",)).units
        own = {unit.channel_parameters for unit in groups}
        return self._is_even and len(own) == 1 and self.budget.widths != "equal"

    def size(self, kept_U: Sequence[int]) -> int:
        """Return what all groups cache together if units keep so many."""
        return sum(map(mul, kept_U, self.cached_U))

    @cached_property
    def stay(self) -> int:
        """How much of the cache stays at most: of an even one whole groups."""
        unit = max(self.cached_U) if self._is_even else 1
        return unit * math.floor(self.asked * self.size(self.groups_U) / unit + 1e-9)

    def check(self) -> None:
        """Check that so little can stay."""
        widths, instead = sorted(filter(None, self.groups_U)), ""
        if self.budget.whole_part and not self._is_even:
            raise BudgetError(
                "attention layers of this model cache unequally (sliding windows), so how many "
                "have to go depends on which; give --parts kv, found --parts attention"
            )
        if self.budget.whole_part:
            least = max(widths) * max(self.cached_U)
            who = f"at least {max(widths)} of the KV groups stay"
        else:
            named = " and what --keep names stays" if self.budget.keep else ""
            least = self.size(self._least_U())
            who = f"each of the {len(widths)} attention layers keeps one of its KV groups{named}"
            kept = kept_by(self.source, self.budget.keep).attentions
            if self._is_even and len(kept) < len(widths):
                instead = "; whole attention layers go with --parts attention"
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
        """Return how many attention layers are enough, whichever go."""
        # Enough whichever go: as if they were those with the fewest groups.
        widths = sorted(filter(None, self.groups_U))
        most = self.stay / max(self.cached_U)
        gone = next(n for n in range(len(widths)) if sum(widths[n:]) <= most)
        return DropBudget.of_count(self.source, self.budget, gone)

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the least share of the KV groups that is enough."""
        if self.size(self.groups_U) <= self.stay:
            return 0.0
        if self._is_arithmetic:
            # Rounded, so that a half that stays is a half that goes.
            return round(1 - self.stay / self.size(self.groups_U), 12)

        may_go = sum(self.groups_U) - sum(self._least_U())
        size = model_size(self.source, self.budget).of_parts(("kv",))
        most = 1 - size.cost_of(size.least_U) / size.cost_of(size.width_U)

        def is_enough(gone: int) -> bool:
            candidate = Candidate(parts=("kv",), sparsity=most * gone / may_go)
            return self.size(planner.widths(candidate).kept_U) <= self.stay

        return most * (bisect_left(range(1, may_go + 1), True, key=is_enough) + 1) / may_go

    def _least_U(self) -> list[int]:
        """Return how many KV groups of every unit stay at least."""
        kept = kept_by(self.source, self.budget.keep).units
        return [
            groups if index in kept else min(1, groups)
            for index, groups in enumerate(self.groups_U)
        ]

    def facts(self) -> dict[str, Any]:
        """Return what was asked for."""
        conditions = {"groups_before": sum(self.groups_U), "context": self.context}
        return {"goal": self.name, "asked": self.asked, "tried": [], "conditions": conditions}


@dataclass(frozen=True)
class LossIncrease(Constraint):
    """The loss before repair stays within a bound over the dense model's: as much goes as fits."""

    goal: MaxLossIncrease
    held_out: Windows  # to measure on
    runtime: Runtime
    work_dir: WorkDir  # keeps what was found for a run that is resumed
    found: dict[str, Any] = field(default_factory=dict)  # sparsity, dense loss, what was tried

    name = "max_loss_increase"
    needs_statistics = True  # plans are made from them

    def check(self) -> None:
        """Check that channels can go; whether the loss stays within is measured later."""
        super().check()
        highest_step(model_size(self.source, self.budget).of_parts(self.budget.parts))

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the largest share whose loss fits."""
        name = f"loss-{self.held_out.digest[:8]}"  # on other windows it is another
        self.found.update(self.work_dir.once(name, lambda: self._measured(planner, tuple(parts))))
        return float(self.found["sparsity"])

    def facts(self) -> dict[str, Any]:
        """Return what was asked for, tried, and what it was measured on."""
        conditions = {
            "dense_loss": self.found["dense"],
            "held_out": self.held_out.sources,
            "tokens_digest": self.held_out.digest,
            "repair": "measured before any",
        }
        asked = {"goal": self.name, "asked": self.goal.nats, "tried": self.found["tried"]}
        return {**asked, "conditions": conditions}

    def _measured(self, planner: Planner, parts: tuple[Part, ...]) -> dict[str, Any]:
        source, goal = self.source, self.goal
        model = load_whole(source, self.runtime, "--max-loss-increase")
        dense = loss_in_memory(model, self.held_out, "dense")
        size = model_size(source, self.budget)
        tried: list[Attempt] = []

        def is_too_much(step: int) -> bool:
            candidate = Candidate(parts=parts, sparsity=step / STEPS)
            plan = planner.plan(candidate)
            label = f"{candidate.sparsity:.1%} pruned"
            with masked_channels(source, model, dict(enumerate(plan.kept_channels))):
                increase = loss_in_memory(model, self.held_out, label) - dense
            parameters = size.parameters_with(plan.kept_widths)
            fits = increase <= goal.nats
            tried.append(Attempt(candidate.sparsity, parameters, increase, fits))
            return not fits

        highest = highest_step(size.of_parts(parts))
        chosen = bisect_left(range(1, highest + 1), True, key=is_too_much)
        if chosen == 0:
            least = min(tried, key=lambda entry: entry.sparsity)
            raise BudgetError(
                f"the loss cannot stay within {goal.nats:g} nats per token of the dense model's "
                f"{dense:.3f}: already {least.sparsity:.1%} of the {parts_in_words(parts)} cost "
                f"{least.value:.3f}; allow more, or calibrate on text like that it is measured on"
            )
        return {
            "sparsity": chosen / STEPS,
            "dense": round(dense, 6),
            "tried": [vars(each) for each in tried],
        }


def held_out_windows(text: CalibrationText, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Return the windows that a loss is bounded on; calibration has none of them."""
    return draw_left_over(text, tokenizer, HELD_OUT_WINDOWS)


def loss_increase_of(directory: Path, dense: float, settings: PruneSettings) -> float:
    """Return how much the loss of a finished checkpoint is above the dense model's.

    It is measured on the windows of the bound, in nats per token.
    """
    held_out = held_out_windows(settings.text, load_tokenizer(directory))
    result = Checkpoint(directory)
    model = load_whole(result, runtime_of(settings.compute, result), "measuring the loss")
    return loss_in_memory(model, held_out, "result") - dense

"""Prune as little as makes the model so much faster, from latencies measured on this machine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cfsp.errors import BudgetError, UsageError
from cfsp.planning.candidate import NOTHING, Candidate, Dropped, DropSizes
from cfsp.planning.widths import model_size
from cfsp.selection.bisection import Attempt, highest_step, last_that_holds, sparsity_at
from cfsp.selection.constraint import Constraint
from cfsp.selection.drop_budget import DropBudget
from cfsp.selection.latency import Latencies, measure_latencies, most_speedup
from cfsp.speed import Conditions
from cfsp.streaming.runtime import runtime_of

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Removal
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.planning.make import Planner
    from cfsp.settings import Budget, Part, PruneSettings, TargetSpeedup

logger = logging.getLogger(__name__)

_NOUNS: dict[Part, str] = {
    "ffn": "FFN channels",
    "kv": "KV groups",
    "attention": "attention layers",
    "blocks": "blocks",
}


def check_possible(goal: TargetSpeedup, source: WeightSource, settings: PruneSettings) -> None:
    """Check, before anything is timed, that pruning could make a model so much faster at all.

    Raises:
        BudgetError: not even in proportion to the work that would be left.
        UsageError: its FFNs are of several kinds, so that no one width says how long it takes.
    """
    budget = settings.budget
    size = model_size(source)
    kinds = sorted({unit.kind for unit in size.units if unit.part == "ffn"})
    if "ffn" in budget.parts and len(kinds) > 1:
        raise UsageError(
            "--target-speedup times models with one FFN width in all blocks, and the FFNs of "
            f"{source.label} are of several kinds ({', '.join(kinds)}); name other parts, such as "
            "--parts blocks, or give --sparsity and measure with cfsp bench"
        )
    runtime = runtime_of(settings.compute, source)

    def most(*parts: Part) -> float:
        return most_speedup(source, budget, parts, goal.phase, runtime)

    if goal.ratio > (reached := most(*budget.parts)):
        least = _least_left(source, budget)
        # Blocks reach furthest, so it is said even where they may not go.
        alone = dict.fromkeys((*budget.parts, "blocks"))
        raise _out_of_reach(
            goal,
            budget,
            f"by its size it would be {reached:.2f} times faster at best, because the head and "
            f"{least} stay; in theory {_in_words({part: most(part) for part in alone})}",
        )


def measured(goal: TargetSpeedup, source: WeightSource, settings: PruneSettings) -> Latencies:
    """Measure what each part of a model takes, and tell people if that cannot be relied on.

    Raises:
        UsageError: the models to time do not fit into memory.
    """
    multiple = max(model_size(source).multiple_U(settings.budget))
    runtime = runtime_of(settings.compute, source)
    latencies = measure_latencies(source, settings.budget, multiple, goal.phase, runtime)
    warn_of_disturbance(latencies)
    return latencies


def warn_of_disturbance(latencies: Latencies) -> None:
    """Tell people that other programs took so much of the machine that little can be predicted."""
    share = float(latencies.conditions["disturbance"])
    if share > Conditions.disturbance:
        logger.warning(
            f"other programs took {share:.0%} of the processors while latencies were measured: the "
            "prediction is unreliable; repeat it on a quiet machine"
        )


@dataclass(frozen=True)
class Speedup(Constraint):
    """The model is predicted to be so many times faster.

    Attributes:
        goal: how much faster, and in which phase.
        measure: gives the latencies; called once, when a candidate is first asked about.
        tried: what was predicted so far.
    """

    goal: TargetSpeedup
    measure: Callable[[], Latencies]
    tried: list[Attempt] = field(default_factory=list)

    name = "target_speedup"

    @property
    def needs_statistics(self) -> bool:
        """Whether it depends on a plan: not where one part goes whole."""
        return not self._is_one_whole_part

    @property
    def _is_one_whole_part(self) -> bool:
        return len(self.budget.parts) == 1 and bool(self.budget.whole_parts)

    def to_drop(self) -> DropBudget:
        """Return how many are enough of one part, whichever go; of several, half."""
        if not self._is_one_whole_part:
            return super().to_drop()
        part, keep = self.budget.whole_parts[0], self.budget.keep
        return DropBudget.of_count(self.source, part, self._fewest, keep)

    @cached_property
    def latencies(self) -> Latencies:
        """What each part takes."""
        return self.measure()

    def check(self) -> None:
        """Check it, then time the models, in every process: only the first compares."""
        super().check()
        _ = self.latencies

    def of(self, kept_U: Sequence[int], dropped: Dropped = NOTHING) -> float:
        """Return how many times faster the model is with what it keeps of every unit."""
        blocks = self.source.architecture.block_count
        return self.latencies.speedup(self.source.units, kept_U, dropped, blocks)

    def enough(self, order: Sequence[Removal]) -> Dropped:
        """Return the fewest of an order that are enough.

        Raises:
            BudgetError: all are not.
        """
        if self._is_one_whole_part:
            return Dropped.of(order)
        for count in range(1, len(order) + 1):
            if self._is_met_without(dropped := Dropped.of(order[:count])):
                return dropped
        raise self.too_much()

    @cached_property
    def _fewest(self) -> int:
        """How many blocks, or attentions, are enough, whichever go."""
        dropped = NOTHING
        sizes = DropSizes.of(self.source, self.budget.whole_parts, self.budget.keep)
        droppable = sizes.droppable(dropped)
        for count, each in enumerate(droppable[: len(droppable) - (not sizes.some_stay)], 1):
            dropped = dropped.plus(each)
            if self._is_met_without(dropped):
                return count
        raise self.too_much()

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the least share that is enough."""
        whole = model_size(self.source, dropped, self.budget.keep)

        def is_too_slow(step: int) -> bool:
            candidate = Candidate(dropped, 0, tuple(parts), sparsity_at(step))
            kept_U = planner.widths(candidate).kept_U
            left = [
                kept
                for unit, kept in zip(self.source.units, kept_U, strict=True)
                if not dropped.takes(unit)
            ]
            parameters = whole.parameters_with(left)
            return not self._note(candidate.sparsity, parameters, self.of(kept_U, dropped))

        if dropped and not is_too_slow(0):
            return 0.0
        highest = highest_step(whole.of_parts(parts), self.budget)
        if is_too_slow(highest):
            return None
        return sparsity_at(last_that_holds(highest, is_too_slow) + 1)

    def facts(self) -> dict[str, Any]:
        """Return what was asked for, predicted and measured."""
        latency = {
            part: {
                str(kept): round(value, 4)
                for kept, value in zip(curve.kept, curve.relative, strict=True)
            }
            for part, curve in self.latencies.curves.items()
        }
        return {
            "goal": self.name,
            "asked": self.goal.ratio,
            "tried": [vars(each) for each in self.tried],
            "conditions": {
                "phase": self.goal.phase,
                "relative_latency": latency,
                **self.latencies.conditions,
            },
        }

    def too_much(self) -> BudgetError:
        """Return the error that says how far each part reaches."""
        units, multiple_U = self.source.units, model_size(self.source).multiple_U(self.budget)
        reach: dict[Part, float] = {}
        for part in self.budget.parts:
            if part == "blocks":
                gone = range(1, self.source.architecture.block_count)
                kept, dropped = [unit.width for unit in units], Dropped(tuple(gone))
            else:
                unit_part = "ffn" if part == "ffn" else "kv"
                kept = [
                    min(unit.width, {"ffn": multiple, "kv": 1}.get(part, 0))
                    if unit.part == unit_part
                    else unit.width
                    for unit, multiple in zip(units, multiple_U, strict=True)
                ]
                dropped = NOTHING
            reach[part] = self.of(kept, dropped)
        most = max((each.value for each in self.tried), default=1.0)
        return _out_of_reach(
            self.goal,
            self.budget,
            f"it is predicted to be {most:.2f} times faster at most, and head and "
            f"{_least_left(self.source, self.budget)} stay; alone, {_in_words(reach)}",
        )

    def _is_met_without(self, dropped: Dropped) -> bool:
        """Predict what becomes of the model if some blocks or attentions go, and nothing else."""
        units, sizes = self.source.units, DropSizes.of(self.source, self.budget.whole_parts)
        gone = sizes.parameters(dropped)
        value = self.of([0 if dropped.takes(unit) else unit.width for unit in units], dropped)
        left = model_size(self.source).parameters - gone
        return self._note(gone / sizes.total, left, value)

    def _note(self, sparsity: float, parameters: int, value: float) -> bool:
        self.tried.append(Attempt(sparsity, parameters, value, value >= self.goal.ratio))
        return self.tried[-1].fits


def _out_of_reach(goal: TargetSpeedup, budget: Budget, why: str) -> BudgetError:
    return BudgetError(
        f"{goal.phase} cannot become {goal.ratio:g} times faster with --parts "
        f"{','.join(budget.parts)}: {why}; ask for less, or name other parts"
    )


def _least_left(source: WeightSource, budget: Budget) -> str:
    """Return in words what stays of every block, or of all."""
    if "blocks" in budget.parts:
        return "one block"
    left = []
    if "ffn" in budget.parts:
        ffns = model_size(source).of_parts(("ffn",))
        left.append(f"at least {min(ffns.least_U(budget))} channels of every block")
    else:
        left.append("the FFNs")
    if "attention" not in budget.parts:
        left.append(
            "one KV group of every attention layer" if "kv" in budget.parts else "attention"
        )
    return " and ".join(left)


def _in_words(reach: Mapping[Part, float]) -> str:
    """Return how far each part reaches alone."""
    return ", ".join(f"{_NOUNS[part]} reach {value:.2f}" for part, value in reach.items())

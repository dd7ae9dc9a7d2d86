"""Prune as little as makes the model so much faster, from latencies measured on this machine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cfsp.calibration.statistics import Removal
from cfsp.errors import BudgetError, UsageError
from cfsp.planning.candidate import NOTHING, Candidate, Dropped, DropSizes
from cfsp.planning.make import Planner, model_size
from cfsp.selection.constraint import (
    STEPS,
    Attempt,
    Constraint,
    DropBudget,
    highest_step,
    last_that_holds,
)
from cfsp.selection.latency import Latencies, least_widths, measure_latencies, most_speedup
from cfsp.settings import Part, TargetSpeedup
from cfsp.speed import Conditions
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.work_dir import WorkDir, load_or_compute

logger = logging.getLogger(__name__)

_NOUNS: dict[Part, str] = {
    "ffn": "FFN channels",
    "kv": "KV groups",
    "attention": "attention layers",
    "blocks": "blocks",
}


@dataclass(frozen=True)
class Speedup(Constraint):
    """The model is predicted to be so many times faster."""

    goal: TargetSpeedup
    runtime: Runtime
    work_dir: WorkDir  # keeps latencies for a run that is resumed
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
        """What each part takes, measured by a killed run or now; in the first process alone."""

        def measure() -> dict[str, Any]:
            multiple = max(model_size(self.source).multiple_U(self.budget))
            found = measure_latencies(
                self.source, self.budget, multiple, self.goal.phase, self.runtime
            )
            warn_of_disturbance(found)
            return found.to_json()

        with self.work_dir.watch.stage("try"):
            found = self.work_dir.team.from_first(
                lambda: load_or_compute(self.work_dir, "latencies", measure)
            )
        return Latencies.from_json(found)

    def check(self) -> None:
        """Check that sizes allow it, then time the models, in every process."""
        source, budget, phase = self.source, self.budget, self.goal.phase
        kinds = sorted({unit.path for unit in source.units if unit.part == "ffn"})
        if "ffn" in budget.parts and len(kinds) > 1:
            raise UsageError(
                "--target-speedup times models with one FFN width in all blocks, and the FFNs of "
                f"{source.label} are of several kinds ({', '.join(kinds)}); name other parts, such "
                "as --parts blocks, or give --sparsity and measure with cfsp bench"
            )
        reached = most_speedup(source, budget, budget.parts, phase, self.runtime)
        if self.goal.ratio > reached:
            # Blocks reach furthest, so it is said even where they may not go.
            alone = {
                part: most_speedup(source, budget, (part,), phase, self.runtime)
                for part in dict.fromkeys((*budget.parts, "blocks"))
            }
            raise self._out_of_reach(
                f"by its size it would be {reached:.2f} times faster at best, because the head "
                f"and {self._least_left} stay; in theory {_in_words(alone)}"
            )
        super().check()
        _ = self.latencies

    def of(self, kept_U: Sequence[int], dropped: Dropped = NOTHING) -> float:
        """Return how many times faster the model is with what it keeps of every unit."""
        blocks = self.source.architecture.block_count
        return self.latencies.speedup(self.source.units, kept_U, dropped, blocks)

    def enough(self, order: Sequence[Removal]) -> Dropped:
        """Return the fewest of an order that are enough."""
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
            candidate = Candidate(dropped, 0, tuple(parts), step / STEPS)
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
        return (last_that_holds(highest, is_too_slow) + 1) / STEPS

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
        reach: dict[Part, float] = {}
        for part in self.budget.parts:
            gone = range(1, self.source.architecture.block_count) if part == "blocks" else ()
            kept = least_widths(self.source, self.budget, (part,))
            reach[part] = self.of(kept, Dropped(tuple(gone)))
        most = max((each.value for each in self.tried), default=1.0)
        return self._out_of_reach(
            f"it is predicted to be {most:.2f} times faster at most, and head and "
            f"{self._least_left} stay; alone, {_in_words(reach)}"
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

    def _out_of_reach(self, why: str) -> BudgetError:
        return BudgetError(
            f"{self.goal.phase} cannot become {self.goal.ratio:g} times faster with --parts "
            f"{','.join(self.budget.parts)}: {why}; ask for less, or name other parts"
        )

    @property
    def _least_left(self) -> str:
        """What stays of every block, or of all, in words."""
        parts = self.budget.parts
        if "blocks" in parts:
            return "one block"
        left = ["the FFNs"]
        if "ffn" in parts:
            ffns = model_size(self.source).of_parts(("ffn",))
            left = [f"at least {min(ffns.least_U(self.budget))} channels of every block"]
        if "attention" not in parts:
            left.append("one KV group of every attention layer" if "kv" in parts else "attention")
        return " and ".join(left)


def warn_of_disturbance(latencies: Latencies) -> None:
    """Tell people that other programs took so much of the machine that little can be predicted."""
    share = float(latencies.conditions["disturbance"])
    if share > Conditions.disturbance:
        logger.warning(
            f"other programs took {share:.0%} of the processors while latencies were measured: the "
            "prediction is unreliable; repeat it on a quiet machine"
        )


def _in_words(reach: Mapping[Part, float]) -> str:
    """Return how far each part reaches alone."""
    return ", ".join(f"{_NOUNS[part]} reach {value:.2f}" for part, value in reach.items())

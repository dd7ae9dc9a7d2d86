"""Prune as little as makes the model so much faster, from latencies measured on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cfsp.engine.compute import engine_of
from cfsp.errors import BudgetError, UsageError
from cfsp.goals.latency import Latencies, measure_latencies, most_speedup
from cfsp.goals.resolution import Attempt, Resolution
from cfsp.goals.search import budget_at, highest_step, last_that_holds
from cfsp.planning.numbers_to_try import Aim, half_alone
from cfsp.planning.removal import whole_removal
from cfsp.planning.removal_budget import RemovedWhole, WholeSizes, with_counts
from cfsp.planning.widths import NOTHING, model_size, plan_widths
from cfsp.speed import Conditions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget, Part, PruneSettings, TargetSpeedup

logger = logging.getLogger(__name__)

_NOUNS: dict[Part, str] = {
    "ffn": "FFN channels",
    "kv": "KV groups",
    "attention": "attentions",
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
    engine = engine_of(settings.compute, source)

    def most(*parts: Part) -> float:
        return most_speedup(source, budget, parts, goal.phase, engine)

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
    engine = engine_of(settings.compute, source)
    latencies = measure_latencies(source, settings.budget, multiple, goal.phase, engine)
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
class Speed:
    """A speed to be reached, of one model.

    Attributes:
        goal: how much faster, and in which phase.
        source: the model.
        settings: what may go, what counts as important, the multiple, and where to compute.
        latencies: what each part takes.
    """

    goal: TargetSpeedup
    source: WeightSource
    settings: PruneSettings
    latencies: Latencies

    def of(self, kept_U: Sequence[int], removed: RemovedWhole = NOTHING) -> float:
        """Return how many times faster the model is with what it keeps of every unit."""
        blocks = self.source.architecture.block_count
        return self.latencies.speedup(self.source.units, kept_U, removed, blocks)

    def without(self, removed: RemovedWhole) -> Attempt:
        """Return what becomes of the model if some blocks or attentions go, and nothing else."""
        units, sizes = self.source.units, WholeSizes.of(self.source, self._budget.whole_parts)
        value = self.of([0 if removed.takes(unit) else unit.width for unit in units], removed)
        gone = sizes.parameters(removed)
        left = model_size(self.source).parameters - gone
        return Attempt(gone / sizes.total, left, value, value >= self.goal.ratio)

    def fewest(self, beginnings: Iterable[RemovedWhole]) -> Resolution:
        """Return how many blocks and attentions are enough, of beginnings of their order.

        Raises:
            BudgetError: none is.
        """
        tried: list[Attempt] = []
        for removed in beginnings:
            tried.append(self.without(removed))
            if tried[-1].fits:
                return self.resolution(tried, self.with_counts(removed))
        raise self.out_of_reach(max((each.value for each in tried), default=1.0))

    def least_sparsity(
        self, statistics: Statistics, budget: Budget, removed: RemovedWhole
    ) -> tuple[float | None, list[Attempt]]:
        """Return the least share of channels that is enough beside what goes whole, and the tries.

        It is None if no share is.

        Args:
            statistics: of the model, which widths follow from.
            budget: of which parts channels go.
            removed: what goes whole.
        """
        whole, criterion = model_size(self.source, removed), self.settings.criterion
        size = whole.of_parts(budget.parts)
        tried: list[Attempt] = []

        def is_too_slow(step: int) -> bool:
            asked = budget_at(step, budget)
            kept_U = plan_widths(self.source, statistics, asked, criterion, removed).kept_U
            predicted = self.of(kept_U, removed)
            left = [
                kept
                for unit, kept in zip(self.source.units, kept_U, strict=True)
                if not removed.takes(unit)
            ]
            fits = predicted >= self.goal.ratio
            tried.append(Attempt(asked.sparsity, whole.parameters_with(left), predicted, fits))
            return not fits

        if removed.parts and not is_too_slow(0):
            return 0.0, tried
        highest = highest_step(size, budget)
        if is_too_slow(highest):
            return None, tried
        chosen = last_that_holds(highest, is_too_slow) + 1
        return budget_at(chosen, budget).sparsity, tried

    def check_reached(self, statistics: Statistics) -> None:
        """Check that the speed is reached where as much goes whole as is compared.

        Raises:
            BudgetError: it is not.
        """
        removed = RemovedWhole.of(statistics.removals_of(self._budget.whole_parts))
        sparsity, tried = self.least_sparsity(statistics, self.with_counts(removed), removed)
        if sparsity is None:
            raise self.out_of_reach(max(each.value for each in tried))

    def with_counts(self, removed: RemovedWhole) -> Budget:
        """Return the budget that says how many go whole, and no channels beside."""
        return replace(with_counts(self._budget, removed), sparsity=0.0)

    def resolution(self, tried: Iterable[Attempt], budget: Budget) -> Resolution:
        """Return what the goal came to."""
        facts: dict[str, Any] = {
            "phase": self.goal.phase,
            "relative_latency": {
                part: {
                    str(kept): round(value, 4)
                    for kept, value in zip(curve.kept, curve.relative, strict=True)
                }
                for part, curve in self.latencies.curves.items()
            },
            **self.latencies.conditions,
        }
        return Resolution(budget, "target_speedup", self.goal.ratio, tuple(tried), facts)

    def out_of_reach(self, most: float) -> BudgetError:
        """Return the error that says how far each part reaches.

        Args:
            most: the highest speed that was predicted of all together.
        """
        units, multiple_U = self.source.units, model_size(self.source).multiple_U(self._budget)
        reach: dict[Part, float] = {}
        for part in self._budget.parts:
            if part == "blocks":
                gone = range(1, self.source.architecture.block_count)
                kept, removed = [unit.width for unit in units], RemovedWhole(tuple(gone))
            else:
                unit_part = "ffn" if part == "ffn" else "kv"
                kept = [
                    min(unit.width, {"ffn": multiple, "kv": 1}.get(part, 0))
                    if unit.part == unit_part
                    else unit.width
                    for unit, multiple in zip(units, multiple_U, strict=True)
                ]
                removed = NOTHING
            reach[part] = self.of(kept, removed)
        return _out_of_reach(
            self.goal,
            self._budget,
            f"it is predicted to be {most:.2f} times faster at most, and head and "
            f"{_least_left(self.source, self._budget)} stay; alone, {_in_words(reach)}",
        )

    @property
    def _budget(self) -> Budget:
        return self.settings.budget


def resolve_speedup(speed: Speed, statistics: Statistics) -> Resolution:
    """Return the least that is enough, where the number of what goes whole is not left open.

    Raises:
        BudgetError: nothing is predicted to be enough.
    """
    budget, source = speed.settings.budget, speed.source
    if not budget.removes_channels:
        order = statistics.removals_of(budget.whole_parts)
        return speed.fewest(RemovedWhole.of(order[:count]) for count in range(1, len(order) + 1))
    removed = whole_removal(source, statistics, budget, speed.settings.criterion.removal)
    sparsity, tried = speed.least_sparsity(statistics, budget, removed)
    if sparsity is None:
        raise speed.out_of_reach(max(each.value for each in tried))
    return speed.resolution(tried, replace(budget, sparsity=sparsity, of="ffn"))


def aim_at_speed(speed: Speed) -> Aim:
    """Return the aim that all are as fast, whatever number of blocks and attentions goes."""
    budget = speed.settings.budget

    def share(statistics: Statistics, parts: Sequence[Part], removed: RemovedWhole) -> float:
        rest = replace(speed.with_counts(removed), parts=(*parts, *budget.whole_parts))
        sparsity, _ = speed.least_sparsity(statistics, rest, removed)
        return 1.0 if sparsity is None else sparsity

    return Aim({0: half_alone(budget)}, share)


def _out_of_reach(goal: TargetSpeedup, budget: Budget, why: str) -> BudgetError:
    return BudgetError(
        f"{goal.phase} cannot become {goal.ratio:g} times faster with --parts "
        f"{','.join(budget.parts)}: {why}; ask for less, or name other parts"
    )


def _least_left(source: WeightSource, budget: Budget) -> str:
    """Return in words what stays of every block, or of all."""
    if budget.removes_blocks:
        return "one block"
    left = []
    if "ffn" in budget.parts:
        ffns = model_size(source).of_parts(("ffn",))
        left.append(f"at least {min(ffns.least_U(budget))} channels of every block")
    else:
        left.append("the FFNs")
    if "attention" not in budget.parts:
        left.append("one KV group of every attention" if "kv" in budget.parts else "attention")
    return " and ".join(left)


def _in_words(reach: Mapping[Part, float]) -> str:
    """Return how far each part reaches alone."""
    return ", ".join(f"{_NOUNS[part]} reach {value:.2f}" for part, value in reach.items())

"""A number of a model and its bound, which every candidate just meets.

A share of one part, or of all parameters, is met by arithmetic; cache and loss (`goal`) and speed
(`speedup`) by bisection in steps that are small against what a measurement can tell. When enough
blocks or attention layers are dropped, a `DropBudget` says.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.pruned_config import check_attentions_can_go_alone
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.stored_blocks import parameters_of_an_expert
from cfsp.errors import BudgetError
from cfsp.planning.allocation import (
    ModelSize,
    channels_to_keep,
    check_least,
    check_multiple,
    least_in_words,
)
from cfsp.planning.candidate import Dropped, DropSizes, parameters_dropped
from cfsp.planning.importance import experts_to_remove
from cfsp.planning.make import Planner, model_size, parameters_of_channels
from cfsp.settings import PART_NOUNS, Budget, Part


@dataclass(frozen=True)
class DropBudget:
    """When enough blocks, or attention layers, are dropped."""

    sizes: DropSizes
    wanted: float  # the parameters that go, to within half of what goes
    count: int | None = None  # that go; None where `wanted` says it
    at_most: bool = False  # whether less will do: channels beside give the rest

    @staticmethod
    def of_count(source: WeightSource, budget: Budget, count: int) -> DropBudget:
        """Return the budget by which so many blocks, or attention layers, go."""
        sizes = _sizes(source, budget)
        most = len(sizes.size_of) - (not sizes.some_stay)
        if count > most:
            raise _too_many(sizes, counted(count, PART_NOUNS[sizes.part]), str(most))
        return DropBudget(sizes, 0.0, count)

    @staticmethod
    def of_share(
        source: WeightSource, budget: Budget, share: float, *, of_model: bool = False
    ) -> DropBudget:
        """Return the budget by which a share goes of all that may go, or of the whole model."""
        sizes = _sizes(source, budget)
        total = source.parameter_count if of_model else sizes.total
        if share * total > sizes.most + min(sizes.size_of.values(), default=0) / 2:
            whose = "model's" if of_model else sizes.part.removesuffix("s")
            what = f"{share:.1%} of the {whose} parameters"
            raise _too_many(sizes, what, f"{sizes.most / total:.1%}")
        return DropBudget(sizes, share * total)

    def room(self, gone: Collection[int]) -> set[int]:
        """Return what may go next and comes closer to the budget."""
        left = self.sizes.left(gone)
        if self.count is not None:
            return left if len(gone) < self.count else set()
        missing = self._missing(gone)
        return {block for block in left if self.sizes.size_of[block] <= 2 * missing}

    def is_met_by(self, gone: Collection[int]) -> bool:
        """Return whether dropping another one of the largest would not come closer."""
        if self.count is not None:
            return len(gone) >= self.count
        sizes = [self.sizes.size_of[block] for block in self.sizes.left(gone)]
        return not sizes or self._missing(gone) < max(sizes) / 2

    def _missing(self, gone: Collection[int]) -> float:
        return self.wanted - self.sizes.parameters(gone)

    def taken(self, order: Iterable[int]) -> list[int]:
        """Return those of an order that may go and come closer to the budget, each in its turn.

        The order of statistics may have what was not told to stay then.
        """
        taken: list[int] = []
        for block in order:
            if block in self.room(taken):
                taken.append(block)
        return taken

    def dropped(self, gone: Iterable[int]) -> Dropped:
        """Return blocks as those that go, or as those whose attention layers do."""
        return Dropped.of(self.sizes.part, gone)


def _sizes(source: WeightSource, budget: Budget) -> DropSizes:
    assert budget.whole_part is not None
    return DropSizes.of(source, budget.whole_part, budget.keep)


def _too_many(sizes: DropSizes, what: str, most: str) -> BudgetError:
    noun = PART_NOUNS[sizes.part]
    stay = (
        "what --keep names" if sizes.some_stay else f"at least one of {len(sizes.size_of)} {noun}"
    )
    return BudgetError(
        f"cannot remove {what}: {stay} must stay; between 0 and {most} can be removed"
    )


# How much of the blocks is ever dropped beside channels, or of a part that no share is given of.
MOST_DROPPED = 0.5
STEPS = 200  # half a percent of the channels


@dataclass(frozen=True)
class Attempt:
    """One sparsity that was tried."""

    # Of the channels of what stays or, where none may go, of all that may go whole.
    sparsity: float
    parameters: int  # of the model that would be left
    value: float  # what is bounded: loss increase in nats per token, or predicted speed-up
    fits: bool  # whether the bound holds


def highest_step(size: ModelSize) -> int:
    """Return the number of steps up to the highest sparsity that leaves every unit its least."""
    least = size.cost_of(size.least_U)
    highest = math.floor(STEPS * (1 - least / size.cost_of(size.width_U)))
    if highest < 1:
        is_coarse = any(unit.multiple > 1 and not unit.stays for unit in size.units)
        ways = ["choose a smaller --multiple"] if is_coarse else []
        ways += ["--keep less"] if any(unit.stays for unit in size.units) else []
        raise BudgetError(
            f"nothing can be removed: with at least {least_in_words(size)}, less than "
            f"{1 / STEPS:.1%} could go; {', or '.join(ways) or 'name other --parts'}"
        )
    return highest


@dataclass(frozen=True)
class Constraint(ABC):
    """What every candidate of a model just meets."""

    source: WeightSource
    budget: Budget
    # What was predicted or measured on the way to a candidate.
    tried: list[Attempt] = field(default_factory=list, kw_only=True, compare=False)

    name: ClassVar[str] = ""  # of the goal, as its option is called; empty of a share of one part

    @property
    def needs_statistics(self) -> bool:
        """Whether statistics of all the text come before any candidate."""
        return False

    def check(self) -> None:
        """Check before a forward pass that it can be met."""
        source, budget = self.source, self.budget
        if budget.channel_parts:
            check_multiple(budget, model_size(source, budget))
        if budget.whole_part is None:
            return
        goes = not self.to_drop().is_met_by(())
        if goes and budget.whole_part == "attention":
            check_attentions_can_go_alone(source.config, source.architecture)

    def to_drop(self) -> DropBudget:
        """Return how much may go whole, at most; of a budget that has such parts."""
        return half_dropped(self.source, self.budget)

    @abstractmethod
    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the share that these parts' channels lose beside what goes whole, if they can."""

    def facts(self) -> dict[str, Any]:
        """Return what was asked for, tried, and on what it was measured, as JSON types."""
        return {}

    def too_much(self) -> BudgetError:
        """Return the error that no candidate meets it."""
        return BudgetError(
            f"cannot remove so much with --parts {','.join(self.budget.parts)}, neither of one of "
            "them nor of all together; remove less"
        )


@dataclass(frozen=True)
class Share(Constraint):
    """A share of one part goes, or a number of it."""

    def check(self) -> None:
        """Check that so much of the part can go."""
        super().check()
        if self.budget.channel_parts:
            channels_to_keep(self.budget, model_size(self.source, self.budget))
        elif "experts" in self.budget.parts:
            self.experts()

    def to_drop(self) -> DropBudget:
        """Return how much goes."""
        if self.budget.remove is not None:
            return DropBudget.of_count(self.source, self.budget, self.budget.remove)
        return DropBudget.of_share(self.source, self.budget, self.budget.sparsity)

    def experts(self) -> int:
        """Return the number that is nearest to the share, or that was asked for."""
        have = _experts_of(self.source)
        count = self.budget.remove
        wanted = have * (1 - self.budget.sparsity) if count is None else float(have - count)
        return experts_to_remove(self.source, wanted, exactly=count is not None)

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return what was asked for."""
        return self.budget.sparsity


@dataclass(frozen=True)
class Parameters(Constraint):
    """A fraction of all parameters stays; of several parts that pay into it, any may give more."""

    asked: float
    name = "target_params"

    @property
    def share_of_all(self) -> float:
        """The share of all parameters that goes."""
        # Rounded, so that 0.7 that stay are 0.3 that go.
        return round(1 - self.asked, 12)

    def check(self) -> None:
        """Check that the parts own so much."""
        super().check()
        if "experts" in self.budget.parts:
            self.experts()
        if self.budget.compares and self._to_go > self._most:
            raise self.too_much()
        if self.budget.whole_part or not self.budget.channel_parts:
            return
        size = model_size(self.source, self.budget).of_parts(self.budget.parts)
        total, each = size.cost_of(size.width_U), size.parameters_per_cost
        check_least(
            size,
            total - self._to_go / each,
            f"{self.share_of_all:.1%} of the model's parameters",
            size.parameters / each,
        )

    def to_drop(self) -> DropBudget:
        """Return as much; beside channels, which give the rest, no more than may go."""
        if not self.budget.compares:
            return DropBudget.of_share(self.source, self.budget, self.share_of_all, of_model=True)
        sizes = _sizes(self.source, self.budget)
        return DropBudget(sizes, min(self._to_go, sizes.most), at_most=True)

    def experts(self) -> int:
        """Return the number that is nearest."""
        gone = self._to_go / sum(parameters_of_an_expert(self.source).values())
        return experts_to_remove(self.source, _experts_of(self.source) - gone, exactly=False)

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the share of what the channels own that is still to go."""
        missing = self._to_go - parameters_dropped(self.source, dropped)
        if missing <= 0:
            return 0.0
        # Nothing, where all blocks that have some are dropped.
        owned = parameters_of_channels(self.source, parts, dropped)
        return missing / owned if missing < owned else None

    def facts(self) -> dict[str, Any]:
        """Return what was asked for."""
        conditions = {"parameters_before": self.source.parameter_count}
        return {"goal": self.name, "asked": self.asked, "tried": [], "conditions": conditions}

    def too_much(self) -> BudgetError:
        """Return the error that no candidate meets it, with what is beyond them all."""
        return BudgetError(
            f"cannot remove {self.share_of_all:.1%} of the model's parameters with --parts "
            f"{','.join(self.budget.parts)}, neither of one of them nor of all together (less than "
            f"{self._most / self.source.parameter_count:.1%} can go); remove less"
            f"{', or --keep less' if self.budget.keep else ''}"
        )

    @property
    def _to_go(self) -> float:
        return self.share_of_all * self.source.parameter_count

    @property
    def _most(self) -> int:
        """More than can go: all blocks that may, and all channels of the others that may go."""
        sizes, of_staying = _sizes(self.source, self.budget), Counter[int]()
        units = model_size(self.source, self.budget).units
        for unit, size in zip(self.source.units, units, strict=True):
            if unit.part in self.budget.channel_parts and not size.stays:
                of_staying[unit.block] += size.width * size.channel_parameters
        most = sum({**of_staying, **sizes.size_of}.values())
        if sizes.some_stay:
            return most
        return most - min(size - of_staying[each] for each, size in sizes.size_of.items())


def half_dropped(source: WeightSource, budget: Budget) -> DropBudget:
    """Return as much of the blocks, or attention layers, as is dropped where no share says it."""
    sizes = _sizes(source, budget)
    return DropBudget(sizes, min(MOST_DROPPED * sizes.total, sizes.most), at_most=True)


def _experts_of(source: WeightSource) -> int:
    experts = source.architecture.experts
    assert experts is not None
    return experts.count

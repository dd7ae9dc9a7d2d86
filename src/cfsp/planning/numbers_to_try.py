"""Which numbers of blocks, attentions and experts are tried where a budget leaves them open.

Every number of blocks, or attentions, leaves less to take from the channels. Where KV groups may go
as well as FFN channels, each number is tried with them and without.

Where it is open how many experts go, it is tried from none upwards: with the first number every
number of blocks, with each further one none of them and those next to the best so far. Without
channels the budget says how many blocks go beside so many experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import parameter_count
from cfsp.errors import BudgetError
from cfsp.planning.experts import runs_with
from cfsp.planning.removal_budget import (
    RemovedWhole,
    WholeSizes,
    parameters_with_experts,
    whole_in_words,
)
from cfsp.planning.widths import model_size
from cfsp.settings import MOST_REMOVED

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget, Part

# In which steps of all of them it is tried how many experts go.
_STEPS = 8


@dataclass(frozen=True)
class Aim:
    """What is kept equal between numbers of blocks, attentions and experts that are compared.

    Attributes:
        alone: how many experts of each block may go, ascending, and with each of these numbers the
            budget by which as many blocks or attentions go as may be tried beside them.
        share: gives, from statistics, parts and what goes whole, the share that channels of these
            parts lose of what stays; 1 or more where that is not enough.
    """

    alone: Mapping[int, Budget]
    share: Callable[[Statistics, Sequence[Part], RemovedWhole], float]


def half_alone(budget: Budget) -> Budget:
    """Return the budget by which as many blocks or attentions go as are ever compared."""
    return replace(budget.without_channels(), sparsity=MOST_REMOVED, of="ffn")


def whole_alone(source: WeightSource, budget: Budget, experts: int = 0) -> Budget:
    """Return the budget by which as many blocks or attentions go as may be tried.

    One that does not leave the number open stays as it is.

    Args:
        source: the model.
        budget: how much goes.
        experts: how many go of each block, where the budget does not say it.
    """
    if not budget.leaves_number_open:
        return budget
    alone = budget.without_channels()
    if budget.leaves_experts_open:
        alone = replace(alone, remove_experts=experts)
    elif budget.removes_blocks:
        return alone
    if not budget.whole_parts:
        return alone
    experts = alone.remove_experts or 0
    sizes = WholeSizes.of(source, budget.whole_parts, experts)
    is_all = budget.removes_blocks or not budget.removes_channels
    most = sizes.most / sizes.total if is_all else MOST_REMOVED
    share = max(0.0, parameters_to_go(source, budget, experts) / sizes.total)
    return replace(alone, sparsity=min(share, most), of="ffn")


def aim_at_parameters(source: WeightSource, budget: Budget) -> Aim:
    """Return the aim that the sparsity of a budget is: so many parameters go."""
    return Aim(
        {experts: whole_alone(source, budget, experts) for experts in _experts(source, budget)},
        lambda _, parts, removed: share_of_channels(source, budget, parts, removed),
    )


def check_others_own_enough(source: WeightSource, budget: Budget) -> None:
    """Check that the other parts own what is left to go beside as many experts as are tried.

    Raises:
        BudgetError: they do not.
    """
    most = _experts(source, budget)[-1]
    if parameters_to_go(source, budget, most) >= _owned(source, budget, most):
        raise too_much(budget)


def too_much(budget: Budget) -> BudgetError:
    """Return the error that no number of what goes whole leaves little enough to the others."""
    beside = "with channels of the others" if budget.removes_channels else "together"
    return BudgetError(
        f"cannot remove so much: neither {whole_in_words(budget)} alone nor {beside} can so much "
        "go; remove less"
    )


def channels_to_try(budget: Budget) -> list[tuple[Part, ...]]:
    """Return of which parts channels may go: of FFNs alone, and of all."""
    parts = budget.channel_parts
    return [("ffn",), parts] if len(parts) > 1 else [parts]


def counts_to_try(budget: Budget, most: int, best: int | None) -> Sequence[int]:
    """Return how many blocks and attentions are tried with a number of experts, ascending.

    Args:
        budget: whether channels may go.
        most: how many may go.
        best: how many went in the best trial with fewer experts; None where there is none.
    """
    if not budget.removes_channels:
        return [most]
    if best is None:
        return range(most + 1)
    return sorted({0, best - 1, best, best + 1}.intersection(range(most + 1)))


def experts_to_try(source: WeightSource, parameters: float) -> list[int]:
    """Return how many experts of every block may go where it is tried how many should, ascending.

    None, eighths of them, at least one of each group, and as many as own what is to go; of these
    the numbers without which the model runs.

    Args:
        source: the model.
        parameters: to go at most.
    """
    experts = source.architecture.experts
    assert experts is not None
    group = experts.groups
    room = parameters / parameters_with_experts(source, group)
    most = group * min(math.floor(room + 1e-9), experts.count // group - 1)
    steps = (round(step * experts.count / group / _STEPS) for step in range(1, _STEPS))
    numbers = {most, *(group * max(1, step) for step in steps)}
    return [
        0,
        *(n for n in sorted(numbers) if 0 < n <= most and runs_with(source, experts.count - n)),
    ]


def _experts(source: WeightSource, budget: Budget) -> list[int]:
    """Return how many experts of every block go, ascending; one number where it is not open."""
    if budget.leaves_experts_open:
        return experts_to_try(source, parameters_to_go(source, budget))
    return [budget.remove_experts or 0]


def share_of_channels(
    source: WeightSource, budget: Budget, parts: Sequence[Part], removed: RemovedWhole
) -> float:
    """Return the share of what channels of these parts of the others own that is still to go.

    Without such parts it is 1 if another block, or attention, would come closer.
    """
    sizes = WholeSizes.of(source, budget.whole_parts, removed.experts)
    missing = parameters_to_go(source, budget, removed.experts) - sizes.parameters(removed)
    if not parts:
        return float(missing > sizes.largest / 2)
    return max(0.0, missing / _owned_by_channels(source, parts, removed))


def parameters_to_go(source: WeightSource, budget: Budget, experts: int = 0) -> float:
    """Return how many parameters are to go beside so many experts."""
    beside = parameters_with_experts(source, experts)
    if budget.of == "model":
        return budget.sparsity * parameter_count(source) - beside
    if not budget.leaves_experts_open:
        return budget.sparsity * _owned(source, budget, experts)
    total = _owned(source, budget, 0)
    if not budget.removes_blocks and "ffn" not in budget.parts:
        assert source.architecture.experts is not None
        total += parameters_with_experts(source, source.architecture.experts.count)
    return budget.sparsity * total - beside


def _owned(source: WeightSource, budget: Budget, experts: int) -> int:
    """Return the parameters of all that may go beside so many experts; channels are of blocks."""
    beside = RemovedWhole(experts=experts)
    if not budget.whole_parts:
        return _owned_by_channels(source, budget.channel_parts, beside)
    total = WholeSizes.of(source, budget.whole_parts, experts).total
    if not budget.removes_blocks and "ffn" in budget.parts:  # KV groups are of the attentions
        total += _owned_by_channels(source, ("ffn",), beside)
    return total


def _owned_by_channels(source: WeightSource, parts: Sequence[Part], removed: RemovedWhole) -> int:
    """Return the parameters of channels of these parts beside what goes whole."""
    size = model_size(source, removed).of_parts(parts)
    return size.cost_of(size.width_U) * size.parameters_per_cost

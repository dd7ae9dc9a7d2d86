"""Bisection over sparsities, in steps that are small against what a measurement can tell."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cfsp.errors import BudgetError
from cfsp.planning.allocation import ModelSize
from cfsp.settings import Budget

# Half a percent of the channels.
STEPS = 200


@dataclass(frozen=True)
class Attempt:
    """One sparsity that was tried.

    Attributes:
        sparsity: fraction that goes: of the channels of what stays or, where none may go, of the
            parameters of all that may go whole.
        parameters: of the model that would be left.
        value: what is bounded: loss increase in nats per token, or predicted speed-up.
        fits: whether the bound holds.
    """

    sparsity: float
    parameters: int
    value: float
    fits: bool


def highest_step(size: ModelSize, budget: Budget) -> int:
    """Return the number of steps up to the highest sparsity that leaves every FFN a multiple.

    Raises:
        BudgetError: there is none.
    """
    least = size.cost_of(size.least_U(budget))
    highest = math.floor(STEPS * (1 - least / size.cost_of(size.width_U)))
    if highest < 1:
        raise BudgetError(
            f"nothing can be removed: with at least {max(size.multiple_U(budget))} channels left "
            f"in every FFN, less than {1 / STEPS:.1%} of them could go; choose a smaller --multiple"
        )
    return highest


def sparsity_at(step: int) -> float:
    """Return the sparsity of a step."""
    return step / STEPS


def last_that_holds(highest: int, holds: Callable[[int], bool]) -> int:
    """Return the last step in [0, highest] where a condition holds that fails from some step on.

    It is taken to hold at 0, where nothing is pruned, and asked about log2(highest) times.

    Args:
        highest: the last step of all.
        holds: the condition.
    """
    low, high = 0, highest + 1
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low

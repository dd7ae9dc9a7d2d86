"""Allocation: from importance and a budget to a width for every unit.

Pure arithmetic on plain numbers. A channel of one unit may own many times the parameters of
another's: one of 128 experts, which is a channel of each, against one of the expert that is shared.
Budgets are met in parameters, so channels are counted by their cost: parameters over what the
channels of all units have in common. Where all own as many, that is 1, and costs are channels.
The channels of an attention are its KV groups.

Shapes: U units.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import floor, fsum, gcd
from operator import mul
from statistics import fmean

from cfsp.errors import BudgetError, UsageError
from cfsp.settings import DEFAULT_CLAMP, Budget, Clamp, Part, parts_in_words

# The published code stops short of keeping a block whole.
_CLAMP_MARGIN = 1.05
# Costs are whole numbers, which sums of floats may miss by so much.
_SAME_COST = 1e-6


@dataclass(frozen=True)
class UnitSize:
    """The numbers of a unit that a budget is about."""

    width: int  # channels of each of its FFNs, KV groups of an attention
    channel_parameters: int  # that a channel owns, of each of several experts
    multiple: int = 1  # new widths are multiples of this
    grain: int = 1  # widths that are no multiples of this cannot be computed with
    part: Part = "ffn"
    stays: bool = False  # with all its channels

    @property
    def is_rounded(self) -> bool:
        """Whether its widths are rounded: KV groups go one by one."""
        return self.part == "ffn"

    @property
    def least(self) -> int:
        """The least width that it may have."""
        return self.width if self.stays else min(self.multiple, self.width)


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that a budget is about."""

    units: tuple[UnitSize, ...]
    parameters: int  # all of the model

    def of_parts(self, parts: Sequence[Part]) -> ModelSize:
        """Return the numbers with the units of some parts only."""
        return self.only(i for i, unit in enumerate(self.units) if unit.part in parts)

    def only(self, chosen: Iterable[int]) -> ModelSize:
        """Return the numbers with some units only, by their indices."""
        return replace(self, units=tuple(self.units[index] for index in chosen))

    @cached_property
    def width_U(self) -> list[int]:
        """Channels of every unit."""
        return [unit.width for unit in self.units]

    @cached_property
    def parameters_per_cost(self) -> int:
        """Parameters that a cost of 1 stands for."""
        return gcd(*(unit.channel_parameters for unit in self.units))

    @cached_property
    def cost_U(self) -> list[int]:
        """What a channel of every unit costs."""
        each = self.parameters_per_cost
        return [unit.channel_parameters // each for unit in self.units]

    def cost_of(self, width_U: Sequence[int]) -> int:
        """Return what all channels cost if units have these widths."""
        return sum(map(mul, width_U, self.cost_U))

    def parameters_with(self, kept_U: Sequence[int]) -> int:
        """Return the parameters of the model with these widths."""
        removed = self.cost_of(self.width_U) - self.cost_of(kept_U)
        return self.parameters - removed * self.parameters_per_cost

    @property
    def multiple_U(self) -> list[int]:
        """What new widths of every unit are multiples of."""
        return [unit.multiple for unit in self.units]

    @property
    def least_U(self) -> list[int]:
        """The least width that every unit may have."""
        return [unit.least for unit in self.units]


def check_multiple(budget: Budget, size: ModelSize) -> None:
    """Check that the model can be computed with widths in multiples of what the budget says."""
    size = size.of_parts(budget.parts)
    for unit in size.units:
        if unit.multiple % unit.grain:
            raise UsageError(
                f"--multiple must be a multiple of {unit.grain} for this model, found "
                f"{unit.multiple}: experts are multiplied in groups, which requires rows of whole "
                "16 bytes"
            )
    widest = max((unit.width for unit in size.units if unit.is_rounded), default=None)
    if budget.multiple is not None and widest is not None and budget.multiple > widest:
        raise UsageError(
            f"--multiple must be at most {widest} for this model, found {budget.multiple}"
        )


def channels_to_keep(budget: Budget, size: ModelSize) -> float:
    """Return what the channels of the budget's parts that stay may cost, before rounding."""
    size = size.of_parts(budget.parts)
    check_multiple(budget, size)
    total = size.cost_of(size.width_U)
    kept = (1 - budget.sparsity) * total
    asked = f"{budget.sparsity:.1%} of the {parts_in_words(budget.channel_parts)}"
    check_least(size, kept, asked, total)
    return kept


def check_least(size: ModelSize, kept: float, asked: str, of: float) -> None:
    """Check that channels of the least widths cost no more than what stays (`kept`).

    `asked` says in words what is to go, `of` is the cost of what that is a share of.
    """
    least = size.cost_of(size.least_U)
    steps = map(mul, size.multiple_U, size.cost_U)
    # Within half a multiple of the least width is the least width.
    if kept < least - min(steps, default=0) / 2:
        # Rounded down, as so much is not refused then.
        most = floor(1000 * (size.cost_of(size.width_U) - least) / of + 1e-9) / 1000
        raise BudgetError(
            f"cannot remove {asked}: with at least {least_in_words(size)}, between 0 and "
            f"{most:.1%} can be removed"
        )


def least_in_words(size: ModelSize) -> str:
    """Return what every unit keeps at least."""
    widths = sorted({unit.multiple for unit in size.units if unit.is_rounded})
    left = [f"{' or '.join(map(str, widths))} channels left in every FFN"] if widths else []
    if not all(unit.is_rounded for unit in size.units):
        left.append("one KV group in every attention")
    if any(unit.stays for unit in size.units):
        left.append("all that --keep names")
    return " and ".join(left)


def shrunk(
    importance_U: Sequence[float], sparsity: float, weight_U: Sequence[float] | None = None
) -> list[float]:
    """Return importances by which no unit would keep all of its channels, or more.

        keep_u = s_u / mean(s) * (1 - p)

    If some unit would, the positive importances s are shrunk about their mean until the largest
    stays below 1, as the published code does. `weight_U` is how much each counts in the mean.
    """
    mean, largest = fmean(importance_U, weight_U), max(importance_U)
    if sparsity == 0.0 or largest / mean * (1 - sparsity) < 1.0:
        return list(importance_U)
    shrink = mean * (1 / (1 - sparsity) - 1) / (largest - mean) / _CLAMP_MARGIN
    return [mean + (s - mean) * shrink for s in importance_U]


def water_fill(
    importance_U: Sequence[float],
    width_U: Sequence[int],
    cost_U: Sequence[int],
    total: float,
    least_U: Sequence[int],
) -> list[float]:
    """Return widths in proportion to importance, within the least and present ones, of a cost.

        kept_u = min(F_u, max(least_u, c F_u s_u))

    with c such that they cost `total`: what a unit that is whole cannot take goes to the others,
    and they pay for the least of one, in proportion to their importance s, which is positive.
    """
    whole: dict[int, float] = {}
    low: dict[int, float] = {}
    while True:
        fixed = low | whole
        others = [unit for unit in range(len(width_U)) if unit not in fixed]
        wanted = fsum(importance_U[unit] * width_U[unit] * cost_U[unit] for unit in others)
        left = total - sum(width * cost_U[unit] for unit, width in fixed.items())
        level = left / wanted if others else 0.0
        ideal = {unit: level * importance_U[unit] * width_U[unit] for unit in others}
        if full := {unit for unit in others if level * importance_U[unit] >= 1}:
            whole |= {unit: float(width_U[unit]) for unit in full}
        elif few := {unit for unit in others if ideal[unit] < least_U[unit]}:
            low |= {unit: float(least_U[unit]) for unit in few}
            whole = {}  # less is left for them, too
        else:
            return [width for _, width in sorted((fixed | ideal).items())]


def round_widths(
    ideal_U: Sequence[float],
    width_U: Sequence[int],
    cost_U: Sequence[int],
    multiple_U: Sequence[int],
    total: float,
) -> list[int]:
    """Round ideal widths to multiples so that they cost `total` to within one multiple.

    Largest remainder: everything is rounded down, then one multiple at a time goes where the
    largest part of one was lost. A unit keeps at least one multiple and never grows; a width that
    is no multiple stays possible for a unit that is not pruned at all. The sum is met to within
    half of the dearest multiple: units with cheap channels do not stray further than a multiple
    from what their importance gives them to meet it more closely.
    """
    least_U = list(map(min, multiple_U, width_U))
    if total <= sum(map(mul, least_U, cost_U)) + _SAME_COST:  # however dear the next step is
        return least_U
    kept_U = [
        width if ideal >= width else max(least, int(ideal // multiple) * multiple)
        for ideal, width, least, multiple in zip(ideal_U, width_U, least_U, multiple_U, strict=True)
    ]
    close = max(map(mul, multiple_U, cost_U)) / 2
    while True:
        missing = total - sum(map(mul, kept_U, cost_U))
        wider_U = [min(w, k + m) for w, k, m in zip(width_U, kept_U, multiple_U, strict=True)]
        lost_U = [ideal - kept for ideal, kept in zip(ideal_U, kept_U, strict=True)]
        # A step is worth taking if it brings the sum closer to the total.
        useful = [
            unit
            for unit, (kept, wider) in enumerate(zip(kept_U, wider_U, strict=True))
            if abs(missing - (wider - kept) * cost_U[unit]) < abs(missing)
            and (missing > close or lost_U[unit] > 0)
        ]
        if not useful:
            return kept_U
        chosen = max(useful, key=lambda u: (lost_U[u] / multiple_U[u], lost_U[u]))
        kept_U[chosen] = wider_U[chosen]


def allocate(
    importance_U: Sequence[float], budget: Budget, size: ModelSize, clamp: Clamp = DEFAULT_CLAMP
) -> list[int]:
    """Return the number of channels that every unit keeps, by positive importances.

    Units of other parts than those of the budget keep all. Where there are several parts, KV groups
    are rounded first: one owns as much as many channels, which then meet the budget. Where a unit
    would keep more than all, the clamp `water-fill` keeps it whole and gives the rest to the
    others, `published` shrinks all importances.
    """
    total, kept_U = channels_to_keep(budget, size), list(size.width_U)
    of_parts = size.of_parts(budget.parts)
    chosen = [
        index
        for index, unit in enumerate(size.units)
        if unit.part in budget.parts and not unit.stays
    ]
    if budget.sparsity == 0.0 or not chosen:
        return kept_U
    shrinking = size.only(chosen)
    if len(chosen) < len(of_parts.units):  # those that stay pay nothing: the others pay for them
        stay = sum(u.width * u.channel_parameters for u in of_parts.units if u.stays)
        left = (total * of_parts.parameters_per_cost - stay) / shrinking.parameters_per_cost
        total = max(left, shrinking.cost_of(shrinking.least_U))
    kept = _widths([importance_U[index] for index in chosen], budget, shrinking, clamp, total)
    for index, width in zip(chosen, kept, strict=True):
        kept_U[index] = width
    assert all(0 < kept <= width for kept, width in zip(kept_U, size.width_U, strict=True))
    return kept_U


def _widths(
    importance_U: Sequence[float], budget: Budget, size: ModelSize, clamp: Clamp, total: float
) -> list[int]:
    """Return the widths of units that cost `total`; see `allocate`."""
    width_U, cost_U, multiple_U = size.width_U, size.cost_U, size.multiple_U
    fraction = total / size.cost_of(width_U)
    if budget.widths == "equal":
        ideal_U = [fraction * width for width in width_U]
    else:
        filling_U = importance_U
        if clamp == "published":
            weight_U = None if set(cost_U) == {1} else list(map(float, map(mul, width_U, cost_U)))
            filling_U = shrunk(importance_U, 1 - fraction, weight_U)
        ideal_U = water_fill(filling_U, width_U, cost_U, total, size.least_U)
    dear = [index for index, unit in enumerate(size.units) if not unit.is_rounded]
    rest = [index for index, unit in enumerate(size.units) if unit.is_rounded]
    if dear and rest:
        kept_U, left = list(width_U), total * size.parameters_per_cost
        of_dear = fsum(ideal_U[i] * size.units[i].channel_parameters for i in dear)
        for chosen in (dear, rest):
            part, wanted = size.only(chosen), of_dear if chosen is dear else left
            # What rounding left may be out of reach.
            least, most = part.cost_of(part.least_U), part.cost_of(part.width_U)
            cost = min(max(wanted / part.parameters_per_cost, least), most)
            widths = _widths([importance_U[i] for i in chosen], budget, part, clamp, cost)
            left -= part.parameters_per_cost * part.cost_of(widths)
            for index, width in zip(chosen, widths, strict=True):
                kept_U[index] = width
        return kept_U
    if budget.widths == "equal":  # to the nearest multiple: what was equal stays so
        if total <= size.cost_of(size.least_U) + _SAME_COST:  # a wide one would round to more
            return size.least_U
        return [
            min(width, max(1, round(ideal / multiple)) * multiple)
            for ideal, width, multiple in zip(ideal_U, width_U, multiple_U, strict=True)
        ]
    return round_widths(ideal_U, width_U, cost_U, multiple_U, total)

"""Allocation: from block importance and a budget to a width for every block.

Pure arithmetic on plain numbers. Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from statistics import fmean

from cfsp.errors import BudgetError, UsageError
from cfsp.settings import CLAMPS, DEFAULT_CLAMP, Budget, Clamp

# The published code stops short of keeping a block whole.
_CLAMP_MARGIN = 1.05


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that a budget is about.

    Attributes:
        width_L: FFN channels of every block.
        channel_parameters_L: parameters that one channel of each block owns.
        parameters: all parameters of the model.
        grain: widths that are no multiples of this cannot be computed with.
    """

    width_L: tuple[int, ...]
    channel_parameters_L: tuple[int, ...]
    parameters: int
    grain: int = 1

    def parameters_with(self, kept_L: Sequence[int]) -> int:
        """Return the parameters of the model with these widths."""
        removed = sum(
            (width - kept) * each
            for width, kept, each in zip(
                self.width_L, kept_L, self.channel_parameters_L, strict=True
            )
        )
        return self.parameters - removed


def channels_to_keep(budget: Budget, size: ModelSize) -> float:
    """Return how many channels the whole model keeps (before rounding).

    Raises:
        BudgetError: more is to be removed than the FFNs hold.
        UsageError: the model cannot be computed with such widths.
    """
    multiple = budget.multiple_for(size.width_L)
    if multiple % size.grain:
        raise UsageError(
            f"--multiple must be a multiple of {size.grain} for this model, found {multiple}: "
            "experts are multiplied in groups, which requires rows of whole 16 bytes"
        )
    widest = max(size.width_L)
    if budget.multiple is not None and multiple > widest:
        raise UsageError(f"--multiple must be at most {widest} for this model, found {multiple}")
    total = sum(size.width_L)
    least = sum(min(multiple, width) for width in size.width_L)
    if budget.of == "ffn":
        kept = (1 - budget.sparsity) * total
        highest = 1 - least / total
    else:
        # Equal in every block of the known families; the mean serves if one ever differs.
        each = fmean(size.channel_parameters_L)
        kept = total - budget.sparsity * size.parameters / each
        highest = (total - least) * each / size.parameters
    # Within half a multiple of the least width is the least width.
    if kept < least - multiple / 2:
        raise BudgetError(
            f"cannot remove {budget.sparsity:.1%} of the {_NOUN[budget.of]}: with at least "
            f"{multiple} channels left in every block, between 0 and {highest:.1%} can be removed"
        )
    return kept


_NOUN = {"ffn": "FFN channels", "model": "model's parameters"}


def keep_fractions(importance_L: Sequence[float], sparsity: float) -> list[float]:
    """Return the fraction of every block's channels that stays; their mean is 1 - sparsity.

        keep_l = s_l / mean(s) * (1 - p)

    If some block would keep all or more, the importances are shrunk about their mean until
    the largest stays below 1, as the published code does.

    Args:
        importance_L: normalised importance s of each block, positive.
        sparsity: mean fraction p to remove, in [0, 1).
    """
    mean = fmean(importance_L)
    if sparsity == 0.0:
        return [1.0] * len(importance_L)
    if max(importance_L) / mean * (1 - sparsity) >= 1.0:
        shrink = mean * (1 / (1 - sparsity) - 1) / (max(importance_L) - mean) / _CLAMP_MARGIN
        importance_L = [mean + (s - mean) * shrink for s in importance_L]
    return [s / mean * (1 - sparsity) for s in importance_L]


def water_fill(importance_L: Sequence[float], width_L: Sequence[int], total: float) -> list[float]:
    """Return widths in proportion to importance, none above the present one, that sum to `total`.

        kept_l = F_l min(1, c s_l)

    with c such that the sum is met: what a block that is whole cannot take goes to the others, in
    proportion to their importance.

    Args:
        importance_L: normalised importance s of each block, positive.
        width_L: present widths F.
        total: what the widths shall sum to, at most the sum of the present ones.
    """
    whole: set[int] = set()
    while True:
        others = [block for block in range(len(width_L)) if block not in whole]
        wanted = fsum(importance_L[block] * width_L[block] for block in others)
        left = total - sum(width_L[block] for block in whole)
        level = left / wanted if others else 0.0
        full = {block for block in others if level * importance_L[block] >= 1}
        if not full:
            return [
                float(width) if block in whole else level * importance_L[block] * width
                for block, width in enumerate(width_L)
            ]
        whole |= full


def round_widths(
    ideal_L: Sequence[float], width_L: Sequence[int], multiple: int, total: float
) -> list[int]:
    """Round ideal widths to a multiple so that their sum is `total` to within one multiple.

    Largest remainder: everything is rounded down, then one multiple at a time goes where most
    was lost. A block keeps at least one multiple and never grows; a width that is no multiple
    stays possible for a block that is not pruned at all.

    Args:
        ideal_L: wished widths.
        width_L: present widths.
        multiple: what new widths are multiples of.
        total: what the widths shall sum to.
    """
    kept_L = [
        width if ideal >= width else max(min(multiple, width), int(ideal // multiple) * multiple)
        for ideal, width in zip(ideal_L, width_L, strict=True)
    ]

    def up(block: int) -> int:
        return min(width_L[block], kept_L[block] + multiple)

    def down(block: int) -> int:
        above_multiple = kept_L[block] % multiple
        return max(min(multiple, width_L[block]), kept_L[block] - (above_multiple or multiple))

    while True:
        missing = total - sum(kept_L)
        growing = missing > 0
        step = up if growing else down
        # A step is worth taking if it brings the sum closer to the total.
        useful = [
            block
            for block in range(len(kept_L))
            if kept_L[block] != step(block)
            and abs(missing - (step(block) - kept_L[block])) < abs(missing)
        ]
        if not useful:
            return kept_L
        lost = {block: ideal_L[block] - kept_L[block] for block in useful}
        chosen = max(useful, key=lambda b: lost[b] if growing else -lost[b])
        kept_L[chosen] = step(chosen)


def allocate(
    importance_L: Sequence[float], budget: Budget, size: ModelSize, clamp: Clamp = DEFAULT_CLAMP
) -> list[int]:
    """Return the number of channels that every block keeps.

    Args:
        importance_L: normalised importance of each block, positive.
        budget: how much to remove.
        size: the model's numbers.
        clamp: what happens where a block would keep more than all: `water-fill` keeps it whole
            and gives the rest to the others, `published` shrinks all importances.

    Raises:
        BudgetError: no widths meet the budget.
        UsageError: the clamp is unknown.
    """
    if clamp not in CLAMPS:
        raise UsageError(f"unknown clamp {clamp!r}; known are: {', '.join(CLAMPS)}")
    total = channels_to_keep(budget, size)
    if budget.sparsity == 0.0:
        return list(size.width_L)
    if clamp == "water-fill":
        ideal_L = water_fill(importance_L, size.width_L, total)
    else:
        fraction_L = keep_fractions(importance_L, 1 - total / sum(size.width_L))
        ideal_L = [f * width for f, width in zip(fraction_L, size.width_L, strict=True)]
        # Blocks of different width weigh differently in the mean: meet the total, not the mean.
        ideal_L = [ideal * total / sum(ideal_L) for ideal in ideal_L]
    multiple = budget.multiple_for(size.width_L)
    kept_L = round_widths(ideal_L, size.width_L, multiple, total)
    assert all(0 < kept <= width for kept, width in zip(kept_L, size.width_L, strict=True))
    return kept_L

"""How many trainable dimensions each block gets (CFSP, Eq. 9: r_l proportional to s_l).

Pure functions on numbers. Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from cfsp.errors import UsageError

RankAllocation = Literal["importance", "uniform", "inverse", "error"]
RANK_ALLOCATIONS: tuple[RankAllocation, ...] = get_args(RankAllocation)


def allocate_ranks(
    weight_L: Sequence[float], mean_rank: float, allocation: RankAllocation
) -> list[int]:
    """Return the rank of every block; they sum to `mean_rank` times the number of blocks.

    Args:
        weight_L: what ranks follow, for every block, positive: its normalised coarse importance,
            or for `error` what its restoration left of the error.
        mean_rank: at least 1; a fraction is allowed, the total is rounded.
        allocation: proportional to the weights (`importance`, `error`), equal, or inverse.

    Raises:
        UsageError: the mean rank is below 1, or a weight is not positive.
    """
    if not 1 <= mean_rank < 1 << 24:
        raise UsageError(f"--rank must be at least 1, found {mean_rank}")
    total = round(mean_rank * len(weight_L))
    if allocation == "uniform":
        return _share([1.0] * len(weight_L), total)
    if not all(value > 0 for value in weight_L):
        what = "error" if allocation == "error" else "importance"
        raise UsageError(
            f"--rank-allocation {allocation} needs a positive {what} for every block, found "
            f"{min(weight_L)}; use --rank-allocation uniform"
        )
    return _share([1 / w for w in weight_L] if allocation == "inverse" else weight_L, total)


def _share(weights_L: Sequence[float], total: int) -> list[int]:
    """Share a total out in proportion to weights, at least 1 each, by largest remainder."""
    shares_L = [0.0] * len(weights_L)
    poor: set[int] = set()
    while True:
        # Blocks that would get less than 1 get exactly 1, the others share what is left.
        rich = [block for block in range(len(weights_L)) if block not in poor]
        weight = sum(weights_L[block] for block in rich)
        left = total - len(poor)
        for block in range(len(weights_L)):
            shares_L[block] = 1.0 if block in poor else left * weights_L[block] / weight
        newly_poor = {block for block in rich if shares_L[block] < 1}
        if not newly_poor:
            break
        poor |= newly_poor
    ranks_L = [int(share) for share in shares_L]
    by_remainder = sorted(range(len(ranks_L)), key=lambda b: (ranks_L[b] - shares_L[b], b))
    for block in by_remainder[: total - sum(ranks_L)]:
        ranks_L[block] += 1
    assert sum(ranks_L) == total, (ranks_L, total)
    return ranks_L

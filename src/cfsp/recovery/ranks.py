"""How many trainable dimensions each block gets (CFSP, Eq. 9: r_l proportional to s_l).

Pure functions on numbers. Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from cfsp.errors import UsageError

RankAllocation = Literal["importance", "uniform", "inverse"]
RANK_ALLOCATIONS: tuple[RankAllocation, ...] = get_args(RankAllocation)


def allocate_ranks(
    importance_L: Sequence[float], mean_rank: float, allocation: RankAllocation
) -> list[int]:
    """Return the rank of every block; they sum to `mean_rank` times the number of blocks.

    Args:
        importance_L: normalised coarse importance of every block, positive.
        mean_rank: at least 1; a fraction is allowed, the total is rounded.
        allocation: proportional to the importance, equal, or proportional to its inverse.

    Raises:
        UsageError: the mean rank is below 1, or an importance is not positive.
    """
    if not 1 <= mean_rank < 1 << 24:
        raise UsageError(f"--rank must be at least 1, found {mean_rank}")
    if allocation != "uniform" and not all(value > 0 for value in importance_L):
        raise UsageError(
            f"--rank-allocation {allocation} needs a positive importance for every block, found "
            f"{min(importance_L)}; use --rank-allocation uniform"
        )
    weights_L = {
        "importance": list(importance_L),
        "uniform": [1.0] * len(importance_L),
        "inverse": [1 / value if value > 0 else 1.0 for value in importance_L],
    }[allocation]
    return _share(weights_L, round(mean_rank * len(weights_L)))


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

"""How many trainable dimensions each block gets (CFSP, Eq. 9: r_l proportional to s_l).

Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import PlanError, RecoveryError, UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.recovery.settings import Adaptation, RankAllocation


def ranks_of(source: Checkpoint, adaptation: Adaptation) -> list[int] | None:
    """Return the rank of every block; None for full training, which has none.

    Raises:
        RecoveryError: ranks follow the importance, and the checkpoint does not hold it.
        PlanError: its plan is for another number of blocks.
        UsageError: an importance is not positive.
    """
    if adaptation.method == "full":
        return None
    uniform = adaptation.allocation == "uniform"
    weight_L = [1.0] * int(source.architecture.block_count) if uniform else _importances(source)
    return allocate_ranks(weight_L, adaptation.rank, adaptation.allocation)


def _importances(source: Checkpoint) -> list[float]:
    """Return the normalised coarse importance of every block, from the plan."""
    path = source.directory / PLAN_FILE
    blocks = int(source.architecture.block_count)
    if not path.is_file():
        raise RecoveryError(
            f"{source.label} was not pruned by cfsp: it has no {PLAN_FILE} with the importance of "
            "its blocks; recover it with --rank-allocation uniform"
        )
    # Attentions of a stock model are not opened, those of others are.
    plan = PruningPlan.load(path).only("ffn")
    expected = [unit.block for unit in source.architecture.of_part("ffn").units]
    planned = [plan.index_of_block(unit.block) for unit in plan.kept_units]
    if planned != expected:
        raise PlanError(
            f"{path} describes {len(planned)} FFNs, the model has {len(expected)} in {blocks} "
            "blocks; recover it with --rank-allocation uniform"
        )
    importance_of = {plan.index_of_block(unit.block): unit.importance for unit in plan.kept_units}
    # Of blocks without an FFN nothing was removed, and no importance is known.
    mean = fmean(importance_of.values())
    return [importance_of.get(block, mean) for block in range(blocks)]


def allocate_ranks(
    weight_L: Sequence[float], mean_rank: float, allocation: RankAllocation
) -> list[int]:
    """Return the rank of every block; they sum to `mean_rank` times the number of blocks.

    Args:
        weight_L: the normalised coarse importance of every block, positive.
        mean_rank: at least 1; a fraction is allowed, the total is rounded.
        allocation: proportional to the weights, equal, or inverse.

    Raises:
        UsageError: a weight is not positive.
    """
    total = round(mean_rank * len(weight_L))
    if allocation == "uniform":
        return _share([1.0] * len(weight_L), total)
    if not all(value > 0 for value in weight_L):
        raise UsageError(
            f"--rank-allocation {allocation} needs a positive importance for every block, found "
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

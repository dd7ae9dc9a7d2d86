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


def ranks_of(source: Checkpoint, adaptation: Adaptation) -> list[int | None]:
    """Return the rank of every block's adapters; full training has none.

    Raises:
        RecoveryError: ranks follow the importance, and the checkpoint does not hold it.
        PlanError: its plan is for another number of blocks.
        UsageError: an importance is not positive.
    """
    blocks = int(source.architecture.block_count)
    if adaptation.method == "full":
        return [None] * blocks
    weight_L = [1.0] * blocks if adaptation.allocation == "uniform" else _importances(source)
    return [*allocate_ranks(weight_L, adaptation.rank, adaptation.allocation)]


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
        allocation: equal, proportional to the weights, or inverse.

    Raises:
        UsageError: a weight is not positive.
    """
    if allocation == "uniform":
        weight_L = [1.0] * len(weight_L)
    elif not all(value > 0 for value in weight_L):
        raise UsageError(
            f"--rank-allocation {allocation} needs a positive importance for every block, found "
            f"{min(weight_L)}; use --rank-allocation uniform"
        )
    elif allocation == "inverse":
        weight_L = [1 / weight for weight in weight_L]
    total, poor = round(mean_rank * len(weight_L)), set[int]()
    while True:
        # Blocks that would get less than 1 get exactly 1, the others share what is left.
        weight = sum(value for block, value in enumerate(weight_L) if block not in poor)
        left = total - len(poor)
        share_L = [
            1.0 if block in poor else left * value / weight for block, value in enumerate(weight_L)
        ]
        newly_poor = {block for block, share in enumerate(share_L) if share < 1}
        if not newly_poor:
            break
        poor |= newly_poor
    # By largest remainder.
    rank_L = [int(share) for share in share_L]
    by_remainder = sorted(range(len(rank_L)), key=lambda b: (rank_L[b] - share_L[b], b))
    for block in by_remainder[: total - sum(rank_L)]:
        rank_L[block] += 1
    assert sum(rank_L) == total, (rank_L, total)
    return rank_L

"""Which blocks go whole, from statistics.

    divergence   those without which the predictions change least, one after the other
                 (`cfsp.whole_model.block_choice`)
    runs         the runs of consecutive blocks that turn the hidden state least: the sum of the
                 angular distances between what enters each run and what leaves it
    influence    the blocks that turn it least, each by itself: 1 - cosine (ShortGPT, arXiv
                 2403.03853)

Only blocks can go that the model can be written without, and that compute what they did then.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from cfsp.engine.block_proof import check_blocks_can_go
from cfsp.errors import StatisticsError, UnsupportedModelError, UsageError
from cfsp.planning.block_budget import BlockBudget
from cfsp.settings import DIVERGENCE, INFLUENCE, REMOVALS, RUNS

if TYPE_CHECKING:
    from cfsp.calibration.statistics import RunDistances, Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget


def blocks_to_remove(
    source: WeightSource, statistics: Statistics, budget: Budget, removal: str
) -> tuple[int, ...]:
    """Return the blocks that go whole, ascending; none where the budget has no such part.

    Args:
        source: the model.
        statistics: of its calibration.
        budget: how much to remove.
        removal: how they are chosen, one of `REMOVALS`.

    Raises:
        BudgetError: the budget can't be met.
        StatisticsError: the statistics lack what the choice needs.
        UnsupportedModelError: the model cannot do without enough of its blocks.
        UsageError: the choice is unknown.
    """
    if not budget.removes_blocks:
        return ()
    wanted = BlockBudget.of(source, budget)
    if wanted.is_met_by(()):
        return ()
    if removal not in REMOVALS:
        raise UsageError(f"unknown removal {removal!r}; known are: {', '.join(REMOVALS)}")
    if removal == DIVERGENCE:
        return _first_removals(statistics, wanted)
    if removal == RUNS and statistics.runs is None:
        raise StatisticsError(
            "the removal of blocks by runs needs their distances, which these statistics do not "
            "have; make them with: cfsp calibrate --parts blocks"
        )
    banned: set[int] = set()
    while True:
        removed = _chosen(statistics, wanted, removal, banned)
        try:
            check_blocks_can_go(source, removed)
        except UnsupportedModelError:
            alone = {block for block in removed if not _can_go_alone(source, block)}
            if not alone:
                raise
            banned |= alone
            continue
        return removed


def _first_removals(statistics: Statistics, wanted: BlockBudget) -> tuple[int, ...]:
    order = [each.block for each in statistics.removals]
    for count in range(1, len(order) + 1):
        if wanted.is_met_by(order[:count]):
            return tuple(sorted(order[:count]))
    raise StatisticsError(
        f"the statistics say of {len(order)} blocks in which order they go, and the budget needs "
        "more; make statistics that say it of more with: cfsp calibrate --parts blocks"
    )


def _chosen(
    statistics: Statistics, wanted: BlockBudget, removal: str, banned: Collection[int]
) -> tuple[int, ...]:
    """Return the blocks that go by a distance, none of which is banned."""
    blocks = len(statistics.blocks)
    candidates = [block for block in range(blocks) if block not in banned]
    for count in range(1, len(candidates) + 1):
        if removal == INFLUENCE:
            cosine_L = statistics.distances("cosine")
            removed = sorted(sorted(candidates, key=cosine_L.__getitem__)[:count])
        else:
            assert statistics.runs is not None
            removed = cheapest_runs(statistics.runs, blocks, count, banned)
        if wanted.is_met_by(removed):
            return tuple(removed)
    raise UnsupportedModelError(
        f"only {len(candidates)} of {blocks} blocks can go, which is less than the budget asks "
        f"for; block {min(banned)} is one that cannot; remove FFN channels too (--parts blocks,ffn)"
    )


def _can_go_alone(source: WeightSource, block: int) -> bool:
    try:
        check_blocks_can_go(source, [block])
    except UnsupportedModelError:
        return False
    return True


def cheapest_runs(
    runs: RunDistances, blocks: int, count: int, banned: Collection[int] = ()
) -> list[int]:
    """Return so many blocks that go, in the runs whose distances have the least sum.

    Two runs have a block between them that stays: without it they would be one.

    Args:
        runs: distances over all runs.
        blocks: how many blocks the model has.
        count: how many go.
        banned: blocks that stay.
    """
    # The least sum for the blocks before one, of which so many go and the last stays.
    best: dict[tuple[int, int], tuple[float, list[int]]] = {(0, 0): (0.0, [])}
    result: tuple[float, list[int]] = (math.inf, [])
    for start in range(blocks + 1):
        for gone in range(count + 1):
            if (start, gone) not in best:
                continue
            total, removed = best[start, gone]
            for end in range(start, blocks + 1):
                if end > start and (end - 1 in banned or gone + end - start > count):
                    break
                cost = total + (runs.between(start, end) if end > start else 0.0)
                chosen = [*removed, *range(start, end)]
                if end == blocks:
                    if len(chosen) == count and cost < result[0]:
                        result = cost, chosen
                    continue
                key = end + 1, len(chosen)
                if key not in best or cost < best[key][0]:
                    best[key] = cost, chosen
    return result[1]

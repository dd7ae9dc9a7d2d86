"""Which blocks go whole, or which attentions, from statistics.

    divergence   those without which the predictions change least, one after the other
                 (`cfsp.whole_model.block_choice`)
    runs         the runs of consecutive blocks that turn the hidden state least: the sum of the
                 angular distances between what enters each run and what leaves it
    influence    the blocks that turn it least, each by itself: 1 - cosine (ShortGPT, arXiv
                 2403.03853)

Distances of attentions are over the sublayer, from its hidden state before to that after; `runs` is
then by the angular distance of each. Only what the model can be written without can go, and the
others must compute what they did then.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from cfsp.engine.block_proof import check_attentions_can_go, check_blocks_can_go
from cfsp.errors import StatisticsError, UnsupportedModelError, UsageError
from cfsp.planning.block_budget import BlockBudget, whole_in_words
from cfsp.settings import DIVERGENCE, INFLUENCE, REMOVALS, RUNS

if TYPE_CHECKING:
    from cfsp.calibration.statistics import RunDistances, Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget


def blocks_to_remove(
    source: WeightSource, statistics: Statistics, budget: Budget, removal: str
) -> tuple[int, ...]:
    """Return the blocks that go whole, or whose attentions do, ascending.

    There are none where the budget has no such part.

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
    if budget.whole_part is None:
        return ()
    wanted = BlockBudget.of(source, budget)
    if wanted.is_met_by(()):
        return ()
    if removal not in REMOVALS:
        raise UsageError(f"unknown removal {removal!r}; known are: {', '.join(REMOVALS)}")
    if removal == DIVERGENCE:
        return _first_removals(statistics, wanted, budget)
    if removal == RUNS and budget.removes_blocks and statistics.runs is None:
        raise StatisticsError(
            "the removal of blocks by runs needs their distances, which these statistics do not "
            "have; make them with: cfsp calibrate --parts blocks"
        )
    banned: set[int] = set()
    while True:
        removed = _chosen(statistics, wanted, budget, removal, banned)
        try:
            check_can_go(source, removed, budget)
        except UnsupportedModelError:
            alone = {block for block in removed if not _can_go_alone(source, block, budget)}
            if not alone:
                raise
            banned |= alone
            continue
        return removed


def check_can_go(source: WeightSource, removed: Collection[int], budget: Budget) -> None:
    """Check that a model can do without some blocks, or without their attentions.

    Raises:
        UnsupportedModelError: it can't.
    """
    if budget.whole_part == "attention":
        check_attentions_can_go(source, removed)
    else:
        check_blocks_can_go(source, removed)


def _first_removals(statistics: Statistics, wanted: BlockBudget, budget: Budget) -> tuple[int, ...]:
    order = [each.block for each in statistics.removals_of(budget.whole_part)]
    for count in range(1, len(order) + 1):
        if wanted.is_met_by(order[:count]):
            return tuple(sorted(order[:count]))
    raise StatisticsError(
        f"the statistics say of {len(order)} {whole_in_words(budget)} in which order they go, and "
        "the budget needs more; make statistics that say it of more with: cfsp calibrate --parts "
        f"{budget.whole_part}"
    )


def _chosen(
    statistics: Statistics,
    wanted: BlockBudget,
    budget: Budget,
    removal: str,
    banned: Collection[int],
) -> tuple[int, ...]:
    """Return the blocks that go by a distance, or whose attentions do, none of which is banned."""
    blocks = len(statistics.blocks)
    candidates = [block for block in wanted.parameters_of if block not in banned]
    seen = statistics if budget.removes_blocks else statistics.of_part("kv")
    for count in range(1, len(candidates) + 1):
        if removal == INFLUENCE or not budget.removes_blocks:
            distance_L = seen.distances("cosine" if removal == INFLUENCE else "angular")
            removed = sorted(sorted(candidates, key=distance_L.__getitem__)[:count])
        else:
            assert statistics.runs is not None
            removed = cheapest_runs(statistics.runs, blocks, count, banned)
        if wanted.is_met_by(removed):
            return tuple(removed)
    raise UnsupportedModelError(
        f"only {len(candidates)} of {len(wanted.parameters_of)} {whole_in_words(budget)} can go, "
        f"which is less than the budget asks for; that of block {min(banned)} is one that cannot; "
        f"remove FFN channels too (--parts {budget.whole_part},ffn)"
    )


def _can_go_alone(source: WeightSource, block: int, budget: Budget) -> bool:
    try:
        check_can_go(source, [block], budget)
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

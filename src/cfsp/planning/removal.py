"""What goes whole, from statistics: which blocks and which attentions, and how many experts.

    divergence   those without which the predictions change least, one after the other
                 (`cfsp.whole_model.removal_order`)
    runs         the runs of consecutive blocks that turn the hidden state least: the sum of the
                 angular distances between what enters each run and what leaves it
    influence    the blocks that turn it least, each by itself: 1 - cosine (ShortGPT, arXiv
                 2403.03853)

Blocks and attentions together go by the divergence alone: distances of the two are not comparable.
Distances of attentions are over the sublayer, from its hidden state before to that after; `runs` is
then by the angular distance of each. Only what the model can be written without can go, and the
others must compute what they did then.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.engine.block_proof import check_attentions_can_go, check_blocks_can_go
from cfsp.errors import StatisticsError, UnsupportedModelError, UsageError
from cfsp.planning.experts import experts_to_remove
from cfsp.planning.removal_budget import (
    RemovalBudget,
    RemovedWhole,
    check_is_definite,
    whole_in_words,
)
from cfsp.settings import AUTO_METRIC, DIVERGENCE, INFLUENCE, REMOVALS, RUNS, WHOLE_PARTS

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Removal, RunDistances, Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget

NEEDS_PREDICTIONS = (
    f"--parts {','.join(WHOLE_PARTS)} compares blocks with attentions by the predictions, which "
    "requires the whole model in memory and --set removal=divergence; prune blocks, then "
    "attentions of the result"
)


def definite_removal(removal: str, statistics: Statistics, budget: Budget) -> str:
    """Return how it is chosen what goes whole: of `auto` what the statistics allow."""
    if removal != AUTO_METRIC:
        return removal
    parts = budget.whole_parts
    return DIVERGENCE if len(parts) > 1 or statistics.removals_of(parts) else RUNS


def whole_removal(
    source: WeightSource, statistics: Statistics, budget: Budget, removal: str
) -> RemovedWhole:
    """Return what goes whole; nothing where the budget has no such part.

    Args:
        source: the model.
        statistics: of its calibration.
        budget: how much to remove.
        removal: how they are chosen, one of `REMOVALS`, or `auto`.

    Raises:
        BudgetError: the budget can't be met.
        StatisticsError: the statistics lack what the choice needs.
        UnsupportedModelError: the model cannot do without enough of its blocks.
        UsageError: the choice is unknown, or how many go is to be tried.
    """
    check_is_definite(budget)
    experts = experts_to_remove(source, budget)
    if not budget.whole_parts:
        return RemovedWhole(experts=experts)
    removal = definite_removal(removal, statistics, budget)
    return replace(_one_by_one(source, statistics, budget, removal), experts=experts)


def _one_by_one(
    source: WeightSource, statistics: Statistics, budget: Budget, removal: str
) -> RemovedWhole:
    """Return the blocks and attentions that go."""
    if removal not in REMOVALS:
        raise UsageError(f"unknown removal {removal!r}; known are: {', '.join(REMOVALS)}")
    wanted = RemovalBudget.of(source, budget)
    if removal == DIVERGENCE:
        return _by_order(source, statistics, budget)
    if wanted.is_met_by(RemovedWhole()):
        return RemovedWhole()
    if len(budget.whole_parts) > 1:
        raise UsageError(NEEDS_PREDICTIONS)
    if removal == RUNS and budget.removes_blocks and statistics.runs is None:
        raise StatisticsError(
            "the removal of blocks by runs needs their distances, which these statistics do not "
            "have; make them with: cfsp calibrate --parts blocks"
        )
    banned: set[int] = set()
    while True:
        removed = _chosen(statistics, wanted, budget, removal, banned)
        try:
            check_can_go(source, removed)
        except UnsupportedModelError:
            chosen = (*removed.blocks, *removed.attentions)
            alone = {block for block in chosen if not _can_go_alone(source, block, budget)}
            if not alone:
                raise
            banned |= alone
            continue
        return removed


def check_can_go(source: WeightSource, removed: RemovedWhole) -> None:
    """Check that a model can do without some blocks, and without the attentions of others.

    Raises:
        UnsupportedModelError: it can't.
    """
    if removed.blocks:
        check_blocks_can_go(source, removed.blocks)
    if removed.attentions:
        check_attentions_can_go(source, removed.attentions, removed.blocks)


def first_removals(
    source: WeightSource, statistics: Statistics, budget: Budget
) -> list[Removal] | None:
    """Return the first in the order of removal that come closer to a budget, each in its turn.

    None if the order was not measured so far.

    Args:
        source: the model.
        statistics: say the order.
        budget: how much goes whole.

    Raises:
        BudgetError: more than all but one.
    """
    wanted, removed = RemovalBudget.of(source, budget), RemovedWhole()
    taken = []
    for each in statistics.removals_of(budget.whole_parts):
        if wanted.has_room_for(removed, (each.part, each.block)):
            taken.append(each)
            removed = removed.plus((each.part, each.block))
    return taken if wanted.is_met_by(removed) else None


def _by_order(source: WeightSource, statistics: Statistics, budget: Budget) -> RemovedWhole:
    order = statistics.removals_of(budget.whole_parts)
    taken = first_removals(source, statistics, budget)
    if taken is None:
        raise StatisticsError(
            f"the statistics say of {len(order)} {whole_in_words(budget)} in which order they go, "
            "and the budget needs more; make statistics that say it of more with: cfsp calibrate "
            f"--parts {','.join(budget.whole_parts)}"
        )
    removed = RemovedWhole.of(taken)
    if taken != order[: len(taken)]:  # the first ones are proved already
        check_can_go(source, removed)
    return removed


def _chosen(
    statistics: Statistics,
    wanted: RemovalBudget,
    budget: Budget,
    removal: str,
    banned: Collection[int],
) -> RemovedWhole:
    """Return the blocks that go by a distance, or whose attentions do, none of which is banned."""
    blocks = len(statistics.blocks)
    every = wanted.sizes.block_of or wanted.sizes.attention_of
    candidates = [block for block in every if block not in banned]
    seen = statistics if budget.removes_blocks else statistics.of_part("kv")
    for count in range(1, len(candidates) + 1):
        if removal == INFLUENCE or not budget.removes_blocks:
            distance_L = seen.distances("cosine" if removal == INFLUENCE else "angular")
            chosen = sorted(sorted(candidates, key=distance_L.__getitem__)[:count])
        else:
            assert statistics.runs is not None
            chosen = cheapest_runs(statistics.runs, blocks, count, banned)
        removed = _of_one_part(budget, chosen)
        if wanted.is_met_by(removed):
            return removed
    raise UnsupportedModelError(
        f"only {len(candidates)} of {len(every)} {whole_in_words(budget)} can go, "
        f"which is less than the budget asks for; that of block {min(banned)} is one that cannot; "
        f"remove FFN channels too (--sparsity with --parts {','.join(budget.whole_parts)},ffn)"
    )


def _of_one_part(budget: Budget, blocks: Collection[int]) -> RemovedWhole:
    """Return blocks as those that go, or as those whose attentions do."""
    chosen = tuple(blocks)
    return RemovedWhole(chosen) if budget.removes_blocks else RemovedWhole((), chosen)


def _can_go_alone(source: WeightSource, block: int, budget: Budget) -> bool:
    try:
        check_can_go(source, _of_one_part(budget, [block]))
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

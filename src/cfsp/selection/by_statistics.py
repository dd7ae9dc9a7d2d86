"""Which blocks and attentions are dropped, from statistics.

    divergence   those without which the predictions change least, one after the other
                 (`cfsp.selection.drop_order`)
    runs         the runs of consecutive blocks that turn the hidden state least: the sum of the
                 angular distances between what enters each run and what leaves it

Blocks and attentions together go by the divergence alone: distances of the two are not comparable.
Distances of attentions are over the sublayer, from its hidden state before to that after; `runs` is
then by the angular distance of each. Only what the model can be written without can go, and the
others must compute what they did then.

Shapes: L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from cfsp.calibration.statistics import Removal, RunDistances, Statistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.errors import StatisticsError, UnsupportedModelError
from cfsp.planning.candidate import NOTHING, Dropped
from cfsp.selection.constraint import DropBudget, drops_in_words
from cfsp.streaming.block_proof import check_attentions_can_go, check_blocks_can_go


def dropped_by(
    source: WeightSource,
    statistics: Statistics,
    budget: DropBudget,
    enough: Callable[[Sequence[Removal]], Dropped] = Dropped.of,
) -> Dropped:
    """Return the blocks and attentions that go, by their order where statistics have one.

    Of that `enough` may take fewer than the budget.
    """
    if statistics.has_order_of(budget.parts):
        return _by_order(source, statistics, budget, enough)
    if budget.is_met_by(NOTHING):
        return NOTHING
    if "blocks" in budget.parts and statistics.runs is None:
        raise StatisticsError(
            "the removal of blocks by runs needs their distances, which these statistics do not "
            "have; make them with: cfsp calibrate --parts blocks"
        )
    banned: set[int] = set()
    while True:
        dropped = _chosen(statistics, budget, banned)
        try:
            check_can_go(source, dropped)
            return dropped
        except UnsupportedModelError:
            chosen = (*dropped.blocks, *dropped.attentions)
            alone = {block for block in chosen if not _can_go_alone(source, block, budget)}
            if not alone:
                raise
            banned |= alone


def check_can_go(source: WeightSource, dropped: Dropped) -> None:
    """Check that a model can do without some blocks, and without the attentions of others."""
    if dropped.blocks:
        check_blocks_can_go(source, dropped.blocks)
    if dropped.attentions:
        check_attentions_can_go(source, dropped.attentions, dropped.blocks)


def _by_order(
    source: WeightSource,
    statistics: Statistics,
    budget: DropBudget,
    enough: Callable[[Sequence[Removal]], Dropped],
) -> Dropped:
    order = statistics.removals_of(budget.parts)
    taken = budget.first(order)
    if taken is None:
        raise StatisticsError(
            f"the statistics say of {len(order)} {drops_in_words(budget.parts)} in which order "
            "they go, and the budget needs more; make statistics that say it of more with: cfsp "
            f"calibrate --parts {','.join(budget.parts)}"
        )
    dropped = enough(taken)
    if taken != order[: len(taken)]:  # the first ones are proved already
        check_can_go(source, dropped)
    return dropped


def _chosen(statistics: Statistics, budget: DropBudget, banned: Collection[int]) -> Dropped:
    """Return the blocks that go by a distance, or whose attentions do, none of which is banned."""
    every = budget.sizes.block_of or budget.sizes.attention_of
    candidates = [block for block in every if block not in banned]
    for count in range(1, len(candidates) + 1):
        if "blocks" in budget.parts:
            assert statistics.runs is not None
            stay = [block for block in range(len(statistics.blocks)) if block not in candidates]
            chosen = cheapest_runs(statistics.runs, len(statistics.blocks), count, stay)
        else:
            distance_L = statistics.of_part("kv").distance_L
            chosen = sorted(sorted(candidates, key=distance_L.__getitem__)[:count])
        dropped = _of_one_part(budget, chosen)
        if budget.is_met_by(dropped):
            return dropped
    stays = f"that of block {min(banned)} is one that cannot; " if banned else ""
    raise UnsupportedModelError(
        f"only {len(candidates)} of {len(every)} {drops_in_words(budget.parts)} can go, "
        f"which is less than the budget asks for; {stays}"
        f"remove FFN channels too (--target-params with --parts {','.join(budget.parts)},ffn)"
    )


def _of_one_part(budget: DropBudget, blocks: Collection[int]) -> Dropped:
    """Return blocks as those that go, or as those whose attentions do."""
    chosen = tuple(blocks)
    return Dropped(chosen) if "blocks" in budget.parts else Dropped((), chosen)


def _can_go_alone(source: WeightSource, block: int, budget: DropBudget) -> bool:
    try:
        check_can_go(source, _of_one_part(budget, [block]))
    except UnsupportedModelError:
        return False
    return True


def cheapest_runs(
    runs: RunDistances, blocks: int, count: int, banned: Collection[int] = ()
) -> list[int]:
    """Return `count` of so many blocks that go, in the runs whose distances have the least sum.

    Two runs have a block between them that stays, as all that are banned do: without it they would
    be one.
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

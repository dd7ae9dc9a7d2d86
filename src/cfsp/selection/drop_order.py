"""Which blocks or attention layers are dropped: by the predictions, or by what statistics say.

By the predictions, where the whole model fits into memory: one after the other the block goes whose
removal, together with those that are gone, changes them least (for each parameter that goes, where
blocks differ in size). A dropped block is skipped: the hidden state passes it unchanged. A block
that did more harm than another before rarely does less once more blocks are gone: each time only
the few that did least are tried again (lazy greedy).

Else by distances: the runs of consecutive blocks go that turn the hidden state least, by the sum of
the angular distances between what enters each run and what leaves it; of attention layers those
over which it turns least. Only what the model can be written without can go.

Shapes: N windows, T tokens, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from cfsp.calibration.statistics import Removal, RunDistances, Statistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.skeleton import stock_config
from cfsp.checkpoint.stored_blocks import names_without_blocks
from cfsp.errors import BudgetError, StatisticsError, UnsupportedModelError, UsageError
from cfsp.job import Job
from cfsp.planning.candidate import Dropped
from cfsp.progress import item_progress
from cfsp.selection.constraint import DropBudget
from cfsp.selection.divergence import MaskedModel, few_beginnings, in_batches, load_whole
from cfsp.settings import PART_NOUNS, Budget
from cfsp.streaming.block_proof import prove_without_attentions, prove_without_blocks

# How many are tried again before one goes, and the tokens of each window that is read for it: one
# block does twice the harm of another, where a few percent tell widths apart.
_TRIED_AGAIN = 2
_TOKENS = 64


def order_of_removal(
    source: WeightSource, model: PreTrainedModel, tokens_NT: Tensor, wanted: DropBudget
) -> list[Removal]:
    """Return the blocks that go, or whose attention does, in the order in which they are chosen."""
    sizes = wanted.sizes
    removed: list[Removal] = []
    gone, divergence = list[int](), 0.0
    refusals: dict[int, UnsupportedModelError] = {}
    added: dict[int, float] = {}  # what each added to the divergence when it was last tried
    masked = MaskedModel(source, model, in_batches(tokens_NT))

    def price(block: int) -> float:
        """For each parameter that goes with it; least of what was not tried yet."""
        return added.get(block, -math.inf) / sizes.size_of[block]

    def cheapest_that_can_go() -> int | None:
        left, fresh, again = wanted.room(gone) - refusals.keys(), set[int](), 0
        while left:
            tried = left & fresh
            cheapest = min(sorted(tried if tried and again >= _TRIED_AGAIN else left), key=price)
            if cheapest not in fresh:
                again += cheapest in added
                without = wanted.dropped([*gone, cheapest])
                added[cheapest] = _divergence_without(masked, without, cheapest) - divergence
                fresh.add(cheapest)
                continue
            try:
                check_can_go(source, wanted.dropped([*gone, cheapest]))
                return cheapest
            except UnsupportedModelError as error:
                refusals[cheapest] = error
                left.discard(cheapest)
        return None

    about = len(wanted.taken(sizes.size_of))
    with item_progress(f"choosing {PART_NOUNS[sizes.part]}", about, "removal") as bar:
        while (best := cheapest_that_can_go()) is not None:
            gone.append(best)
            divergence += added[best]
            removed.append(Removal(best, divergence, sizes.part))
            bar.update()
            masked.note_entering(wanted.dropped(gone))
    if not (wanted.is_met_by(gone) or (wanted.at_most and removed)):
        raise next(
            iter(refusals.values()),
            BudgetError(
                f"of {source.label} no more than {wanted.dropped(gone).in_words or 'nothing'} can "
                "go together; remove less"
            ),
        )
    return removed


def _divergence_without(masked: MaskedModel, gone: Dropped, last: int) -> float:
    """Return the divergence without some, of which one was not gone before; infinite if none."""
    try:
        found = masked.divergence(gone, first=last)
    except Exception:  # however a model misses what a block leaves to others
        return math.inf
    return found if math.isfinite(found) else math.inf


def follow_divergence(job: Job) -> bool:
    """Return whether blocks or attention layers go by what the predictions lose."""
    return job.budget.whole_part is not None and job.fits()


def follow_runs(job: Job) -> bool:
    """Return whether blocks go by how far runs of them turn the hidden state."""
    return "blocks" in job.budget.parts and not follow_divergence(job)


def check_can_be_compared(job: Job) -> None:
    """Check that blocks that are compared with channels go by what predictions lose."""
    if job.budget.compares and not follow_divergence(job):
        needed = "the whole model in memory; prune one part, then another of the result"
        raise cannot_be_tried(job.budget, needed)


def cannot_be_tried(budget: Budget, needed: str) -> UsageError:
    """Return the error that it cannot be tried how much of each part goes."""
    return UsageError(
        f"--parts {','.join(budget.parts)} tries how many blocks should go, which requires {needed}"
    )


def with_order(job: Job, statistics: Statistics, wanted: DropBudget) -> Statistics:
    """Add the order in which blocks or attention layers go, where a budget needs more of it.

    A killed run goes on with what it had chosen. Of several processes the first chooses, on the
    beginnings of a few windows of the calibration text.
    """
    part = wanted.sizes.part
    known = [each.block for each in statistics.removals_of(part)]
    if wanted.is_met_by(wanted.taken(known)):
        return statistics

    def measure() -> dict[str, Any]:
        few = few_beginnings(job.draw(), _TOKENS)
        with job.work_dir.watch.stage("order of removal"):
            what = f"choosing the {PART_NOUNS[part]} that go"
            model = load_whole(job.source, job.runtime, what)
            removals = order_of_removal(job.source, model, few.tokens_NT, wanted)
        return {"removals": [asdict(each) for each in removals]}

    # Other windows would be another choice.
    found = job.work_dir.once(f"removals-{job.draw().digest[:8]}", measure)["removals"]
    others = [each for each in statistics.removals if each.part != part]
    measured = Removal.all_from_json(found, len(statistics.blocks))
    return replace(statistics, removals=(*others, *measured))


def gone_by(source: WeightSource, statistics: Statistics, budget: DropBudget) -> list[int]:
    """Return the blocks that go, or whose attention does, by their order where there is one."""
    part, nouns = budget.sizes.part, PART_NOUNS[budget.sizes.part]
    if order := [each.block for each in statistics.removals_of(part)]:
        taken = budget.taken(order)
        if not budget.is_met_by(taken):
            raise StatisticsError(
                f"the statistics say of {len(order)} {nouns} in which order they go, and the "
                "budget needs more; make statistics that say it of more with: cfsp calibrate "
                f"--parts {part}"
            )
        if taken != order[: len(taken)]:  # the first ones are proved already
            check_can_go(source, budget.dropped(taken))
        return taken
    if budget.is_met_by(()):
        return []
    if part == "blocks" and statistics.runs is None:
        raise StatisticsError(
            "the removal of blocks by runs needs their distances, which these statistics do not "
            "have; make them with: cfsp calibrate --parts blocks"
        )
    banned: set[int] = set()
    while True:
        chosen = _least_distances(statistics, budget, banned)
        try:
            check_can_go(source, budget.dropped(chosen))
            return chosen
        except UnsupportedModelError:
            alone = {each for each in chosen if not can_go(source, budget.dropped([each]))}
            if not alone:
                raise
            banned |= alone


def check_can_go(source: WeightSource, dropped: Dropped) -> None:
    """Check that a model can do without some blocks, and without the attention layers of others."""
    stock = stock_config(source.config)
    if dropped.blocks:
        names_without_blocks(source, dropped.blocks)  # it can be written
        prove_without_blocks(stock, dropped.blocks)
    # Of the attention layers that went before one of each kind must still stay.
    gone = {unit.block for unit in source.architecture.gone} - {*dropped.blocks}
    if dropped.attentions or (dropped.blocks and gone):
        prove_without_attentions(stock, source.architecture, dropped.attentions, dropped.blocks)


def can_go(source: WeightSource, dropped: Dropped) -> bool:
    """Return whether it can; see `check_can_go`."""
    try:
        check_can_go(source, dropped)
    except UnsupportedModelError:
        return False
    return True


def _least_distances(
    statistics: Statistics, budget: DropBudget, banned: Collection[int]
) -> list[int]:
    """Return the blocks that go by a distance, or whose attention does, none of which is banned."""
    every, part = budget.sizes.size_of, budget.sizes.part
    candidates = [block for block in every if block not in banned]
    for count in range(1, len(candidates) + 1):
        if part == "blocks":
            assert statistics.runs is not None
            stay = [block for block in range(len(statistics.blocks)) if block not in candidates]
            chosen = cheapest_runs(statistics.runs, len(statistics.blocks), count, stay)
        else:
            distance_L = statistics.of_part("kv").distance_L
            chosen = sorted(sorted(candidates, key=distance_L.__getitem__)[:count])
        if budget.is_met_by(chosen):
            return chosen
    stays = f"that of block {min(banned)} is one that cannot; " if banned else ""
    raise UnsupportedModelError(
        f"only {len(candidates)} of {len(every)} {PART_NOUNS[part]} can go, which is less than the "
        f"budget asks for; {stays}remove less, then FFN channels of the result"
    )


def cheapest_runs(
    runs: RunDistances, blocks: int, count: int, banned: Collection[int] = ()
) -> list[int]:
    """Return `count` of so many blocks that go, in the runs whose distances have the least sum.

    Two runs have a block between them that stays, as all that are banned do: without it they would
    be one.
    """

    @cache
    def best(start: int, left: int) -> tuple[float, list[int]]:
        """Return the least sum over the blocks from one on, of which so many go, and these."""
        if start >= blocks:
            return (math.inf if left else 0.0), []
        found = [best(start + 1, left)]  # this one stays
        for end in range(start + 1, min(start + left, blocks) + 1):
            if end - 1 in banned:
                break
            cost, later = best(end + 1, left - (end - start))
            found.append((runs.between(start, end) + cost, [*range(start, end), *later]))
        return min(found)

    return best(0, count)[1]

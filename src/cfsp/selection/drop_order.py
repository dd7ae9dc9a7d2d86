"""Which blocks and attention layers are dropped: by the predictions, or by what statistics say.

By the predictions, where the whole model fits into memory: one after the other the block goes whose
removal, together with those that are gone, changes them least (for each parameter that goes, where
attention layers may go too or blocks differ in size). A dropped block is skipped: the hidden state
passes it unchanged. A block whose attention is gone may go later, with what is left of it. A block
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
from cfsp.planning.candidate import NOTHING, Droppable, Dropped
from cfsp.progress import item_progress
from cfsp.selection.constraint import DropBudget
from cfsp.selection.divergence import MaskedModel, few_beginnings, in_batches, load_whole
from cfsp.settings import Budget, parts_in_words
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
    among = wanted.parts if len(wanted.parts) > 1 else ()
    removed: list[Removal] = []
    gone, divergence = NOTHING, 0.0
    refusals: dict[Droppable, UnsupportedModelError] = {}
    added: dict[Droppable, float] = {}  # what each added to the divergence when it was last tried
    masked = MaskedModel(source, model, in_batches(tokens_NT))

    def price(droppable: Droppable) -> float:
        """For each parameter that goes with it; least of what was not tried yet."""
        return added.get(droppable, -math.inf) / sizes.parameters_with(gone, droppable)

    def cheapest_that_can_go() -> Droppable | None:
        left, fresh, again = _room(wanted, gone) - refusals.keys(), set[Droppable](), 0
        while left:
            tried = left & fresh
            cheapest = min(sorted(tried if tried and again >= _TRIED_AGAIN else left), key=price)
            if cheapest not in fresh:
                again += cheapest in added
                added[cheapest] = _divergence_without(masked, gone, cheapest) - divergence
                fresh.add(cheapest)
                continue
            try:
                check_can_go(source, gone.plus(cheapest))
                return cheapest
            except UnsupportedModelError as error:
                refusals[cheapest] = error
                left.discard(cheapest)
        return None

    what = f"choosing {parts_in_words(wanted.parts)}"
    with item_progress(what, _about(wanted), "removal") as bar:
        while (best := cheapest_that_can_go()) is not None:
            part, block = best
            gone, divergence = gone.plus(best), divergence + added[best]
            removed.append(Removal(block, divergence, part, among))
            # A block without its attention is another one than was tried.
            added.pop(("blocks", block), None)
            bar.update()
            masked.note_entering(gone)
    if not (wanted.is_met_by(gone) or (wanted.at_most and removed)):
        raise next(
            iter(refusals.values()),
            BudgetError(
                f"of {source.label} no more than {gone.in_words or 'nothing'} can go together; "
                "remove less"
            ),
        )
    return removed


def _divergence_without(masked: MaskedModel, gone: Dropped, candidate: Droppable) -> float:
    """Return the divergence if another one goes, too; infinite where the model does not run."""
    try:
        found = masked.divergence(gone.plus(candidate), first=candidate[1])
    except Exception:  # however a model misses what a block leaves to others
        return math.inf
    return found if math.isfinite(found) else math.inf


def _room(wanted: DropBudget, gone: Dropped) -> set[Droppable]:
    """Return what may go next."""
    return {each for each in wanted.sizes.droppable(gone) if wanted.has_room_for(gone, each)}


def _about(wanted: DropBudget) -> int:
    """Return about how many go."""
    gone = NOTHING
    while room := _room(wanted, gone):
        gone = gone.plus(max(room))
    return len(gone)


def follow_divergence(job: Job) -> bool:
    """Return whether blocks or attention layers go by what the predictions lose."""
    return bool(job.budget.whole_parts) and job.fits()


def follow_runs(job: Job) -> bool:
    """Return whether blocks go by how far runs of them turn the hidden state."""
    return "blocks" in job.budget.parts and not follow_divergence(job)


def check_can_be_compared(job: Job) -> None:
    """Check that what is compared with other parts, or in number, goes by what predictions lose."""
    is_compared = job.budget.whole_parts and len(job.budget.parts) > 1
    if is_compared and not follow_divergence(job):
        needed = "the whole model in memory; prune one part, then another of the result"
        raise cannot_be_tried(job.budget, needed)


def cannot_be_tried(budget: Budget, needed: str) -> UsageError:
    """Return the error that it cannot be tried how much of each part goes."""
    return UsageError(
        f"--parts {','.join(budget.parts)} tries how many {parts_in_words(budget.whole_parts)} "
        f"should go, which requires {needed}"
    )


def with_order(job: Job, statistics: Statistics, wanted: DropBudget) -> Statistics:
    """Add the order in which blocks or attention layers go, where a budget needs more of it.

    A killed run goes on with what it had chosen. Of several processes the first chooses, on the
    beginnings of a few windows of the calibration text.
    """
    known = statistics.removals_of(wanted.parts)
    if wanted.first(known) is not None:
        return statistics

    def measure() -> dict[str, Any]:
        few = few_beginnings(job.draw(), _TOKENS)
        with job.work_dir.watch.stage("order of removal"):
            what = f"choosing the {parts_in_words(wanted.parts)} that go"
            model = load_whole(job.source, job.runtime, what)
            removals = order_of_removal(job.source, model, few.tokens_NT, wanted)
        return {"removals": [asdict(each) for each in removals]}

    # Other windows would be another choice.
    found = job.work_dir.once(f"removals-{job.draw().digest[:8]}", measure)["removals"]
    others = [each for each in statistics.removals if each not in known]
    measured = Removal.all_from_json(found, len(statistics.blocks))
    return replace(statistics, removals=(*others, *measured))


def dropped_by(source: WeightSource, statistics: Statistics, budget: DropBudget) -> Dropped:
    """Return the blocks and attention layers that go, by their order where statistics have one."""
    if statistics.has_order_of(budget.parts):
        order = statistics.removals_of(budget.parts)
        taken = budget.first(order)
        if taken is None:
            raise StatisticsError(
                f"the statistics say of {len(order)} {parts_in_words(budget.parts)} in which order "
                "they go, and the budget needs more; make statistics that say it of more with: "
                f"cfsp calibrate --parts {','.join(budget.parts)}"
            )
        if taken != order[: len(taken)]:  # the first ones are proved already
            check_can_go(source, Dropped.of(taken))
        return Dropped.of(taken)
    if budget.is_met_by(NOTHING):
        return NOTHING
    for each in statistics.removals:
        if not set(each.among).isdisjoint(budget.parts):
            raise StatisticsError(
                f"the statistics have the order of {parts_in_words(each.among)} together, not of "
                f"{parts_in_words(budget.parts)} alone; make them with: "
                f"cfsp calibrate --parts {','.join(budget.parts)}"
            )
    if "blocks" in budget.parts and statistics.runs is None:
        raise StatisticsError(
            "the removal of blocks by runs needs their distances, which these statistics do not "
            "have; make them with: cfsp calibrate --parts blocks"
        )
    banned: set[int] = set()
    while True:
        chosen = _least_distances(statistics, budget, banned)
        try:
            check_can_go(source, budget.of_blocks(chosen))
            return budget.of_blocks(chosen)
        except UnsupportedModelError:
            alone = {each for each in chosen if not can_go(source, budget.of_blocks([each]))}
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
    every = budget.sizes.of_one
    candidates = [block for block in every if block not in banned]
    for count in range(1, len(candidates) + 1):
        if "blocks" in budget.parts:
            assert statistics.runs is not None
            stay = [block for block in range(len(statistics.blocks)) if block not in candidates]
            chosen = cheapest_runs(statistics.runs, len(statistics.blocks), count, stay)
        else:
            distance_L = statistics.of_part("kv").distance_L
            chosen = sorted(sorted(candidates, key=distance_L.__getitem__)[:count])
        if budget.is_met_by(budget.of_blocks(chosen)):
            return chosen
    stays = f"that of block {min(banned)} is one that cannot; " if banned else ""
    raise UnsupportedModelError(
        f"only {len(candidates)} of {len(every)} {parts_in_words(budget.parts)} can go, "
        f"which is less than the budget asks for; {stays}"
        f"remove FFN channels too (--target-params with --parts {','.join(budget.parts)},ffn)"
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

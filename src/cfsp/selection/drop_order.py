"""Which blocks and attentions are dropped, where the whole model fits into memory.

One after the other the block goes whose removal, together with those that are gone, changes the
predictions least. A dropped block is skipped: the hidden state passes it unchanged. What enters a
block does not depend on later ones, so only the blocks behind a tried one are computed again. The
same of attentions, whose own blocks are computed again as well.

Where blocks and attentions may go, and where blocks differ in size, the change is compared for each
parameter that goes. A block whose attention is gone may go later, with what is left of it.

A block that did more harm than another before rarely does less once more blocks are gone: each time
only the few that did least are tried again (lazy greedy), so that the price is one pass for each
block and a few for each that goes.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibration.statistics import Removal, Statistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.errors import BudgetError, UnsupportedModelError, UsageError
from cfsp.planning.candidate import NOTHING, Droppable, Dropped, DropSizes
from cfsp.progress import item_progress
from cfsp.selection.by_statistics import check_can_go
from cfsp.selection.constraint import DropBudget, drops_in_words
from cfsp.selection.divergence import few_beginnings, load_whole
from cfsp.selection.masks import MaskedModel
from cfsp.settings import WHOLE_PARTS, Budget
from cfsp.streaming.runtime import Runtime, fits
from cfsp.streaming.work_dir import WorkDir, load_or_compute
from cfsp.text.windows import Windows, check_is_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_WINDOWS_IN_BATCH = 4
# How many are tried again before one goes, and the tokens of each window that is read for it: one
# block does twice the harm of another, where a few percent tell widths apart.
_TRIED_AGAIN = 2
_TOKENS = 64


def order_of_removal(
    source: WeightSource,
    model: PreTrainedModel,
    tokens_NT: Tensor,
    wanted: Sequence[DropBudget],
    check: Callable[[Dropped], None],
    on_removal: Callable[[], object] = lambda: None,
) -> list[Removal]:
    """Return the blocks that go, or whose attentions do, in the order in which they are chosen.

    How much is `wanted` may be said in several ways, of the same parts. `check` raises
    UnsupportedModelError where the model cannot do without these, `on_removal` is called after each
    that is chosen.
    """
    sizes, parts = wanted[0].sizes, wanted[0].parts
    among = parts if len(parts) > 1 else ()
    removed: list[Removal] = []
    gone, divergence = NOTHING, 0.0
    refusals: dict[Droppable, UnsupportedModelError] = {}
    # What each added to the divergence when it was last tried.
    added: dict[Droppable, float] = {}
    masked = MaskedModel(source, model, torch.split(tokens_NT, _WINDOWS_IN_BATCH), resumes=True)
    while True:
        left = _room(wanted, gone) - refusals.keys()
        fresh: set[Droppable] = set()
        again = 0
        best = None
        while left and best is None:
            tried = left & fresh
            cheapest = _cheapest(
                tried if tried and again >= _TRIED_AGAIN else left, added, sizes, gone
            )
            if cheapest not in fresh:
                again += cheapest in added
                added[cheapest] = _divergence_without(masked, gone, cheapest) - divergence
                fresh.add(cheapest)
                continue
            try:
                check(gone.plus(cheapest))
                best = cheapest
            except UnsupportedModelError as error:
                refusals[cheapest] = error
                left.discard(cheapest)
        if best is None:
            break
        part, block = best
        gone, divergence = gone.plus(best), divergence + added[best]
        removed.append(Removal(block, divergence, part, among))
        # A block without its attention is another one than was tried.
        added.pop(("blocks", block), None)
        on_removal()
        masked.note_entering(gone)
    if not all(each.is_met_by(gone) for each in wanted):
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


def _room(wanted: Sequence[DropBudget], gone: Dropped) -> set[Droppable]:
    """Return what may go next for one of the budgets."""
    return {
        droppable
        for droppable in wanted[0].sizes.droppable(gone)
        if any(each.has_room_for(gone, droppable) for each in wanted)
    }


def _cheapest(
    left: Collection[Droppable],
    added: Mapping[Droppable, float],
    sizes: DropSizes,
    gone: Dropped,
) -> Droppable:
    """Return what adds the least for each parameter that goes with it, or was not tried yet."""

    def price(droppable: Droppable) -> float:
        share = sizes.parameters_with(gone, droppable) / sizes.largest
        return added.get(droppable, -math.inf) / share

    return min(sorted(left), key=price)


def follow_divergence(source: WeightSource, budget: Budget, runtime: Runtime) -> bool:
    """Return whether blocks or attentions go by what the predictions lose."""
    return bool(budget.whole_parts) and fits(source, runtime)


def follow_runs(source: WeightSource, budget: Budget, runtime: Runtime) -> bool:
    """Return whether blocks go by how far runs of them turn the hidden state."""
    return "blocks" in budget.parts and not follow_divergence(source, budget, runtime)


def check_can_be_compared(source: WeightSource, budget: Budget, runtime: Runtime) -> None:
    """Check that what is compared with other parts, or in number, goes by what predictions lose."""
    if not budget.whole_parts or len(budget.parts) == 1:
        return
    if fits(source, runtime):
        return
    if budget.whole_parts == WHOLE_PARTS:
        raise UsageError(
            f"--parts {','.join(WHOLE_PARTS)} compares blocks with attention layers by the "
            "predictions, which requires the whole model in memory; prune blocks, then attention "
            "layers of the result"
        )
    raise UsageError(
        f"--parts {','.join(budget.parts)} tries how many {drops_in_words(budget.whole_parts)} "
        "should go, which requires the whole model in memory; prune one part, then another of "
        "the result"
    )


def with_order(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    wanted: Sequence[DropBudget],
    runtime: Runtime,
    work_dir: WorkDir,
) -> Statistics:
    """Add the order in which blocks or attentions go, where budgets need more of it.

    A killed run goes on with what it had chosen. Of several processes the first chooses, on the
    beginnings of a few windows of the calibration text.
    """
    missing = [each for each in wanted if each.first(statistics.removals_of(each.parts)) is None]
    if not missing:
        return statistics
    needed = {each.parts for each in missing}

    def measure() -> dict[str, Any]:
        removals: list[Removal] = []
        for parts in sorted(needed):
            check_is_text(windows, f"--parts {','.join(parts)}")
            with work_dir.watch.stage("order of removal"):
                budgets = [each for each in missing if each.parts == parts]
                removals += measure_order(source, windows, budgets, runtime)
        return {"removals": [each.to_json() for each in removals]}

    # Other windows would be another choice.
    name = f"removals-{windows.digest[:8]}"
    found = work_dir.team.from_first(lambda: load_or_compute(work_dir, name, measure)["removals"])
    others = [each for each in statistics.removals if (each.among or (each.part,)) not in needed]
    measured = Removal.all_from_json(found, len(statistics.blocks))
    return replace(statistics, removals=(*others, *measured))


def measure_order(
    source: WeightSource, windows: Windows, wanted: Sequence[DropBudget], runtime: Runtime
) -> list[Removal]:
    """Return what goes, in the order in which it is chosen, on a little of the text."""
    if not _room(wanted, NOTHING):
        return []
    what = drops_in_words(wanted[0].parts)
    few = few_beginnings(windows, _TOKENS)
    model = load_whole(source, runtime, f"choosing the {what} that go")
    gone, about = NOTHING, 0
    while room := _room(wanted, gone):
        gone, about = gone.plus(max(room)), about + 1
    with item_progress(f"choosing {what}", about, "removal") as bar:
        check = partial(check_can_go, source)
        return order_of_removal(source, model, few.tokens_NT, wanted, check, bar.update)

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

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibration.statistics import Removal, Statistics
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.errors import BudgetError, UnsupportedModelError, UsageError
from cfsp.planning.candidate import NOTHING, Droppable, Dropped
from cfsp.progress import item_progress
from cfsp.selection.by_statistics import NEEDS_PREDICTIONS, check_can_go
from cfsp.selection.divergence import can_resume, dense_predictions, few_beginnings
from cfsp.selection.drop_budget import DropBudget, drops_in_words
from cfsp.selection.load import call_form_of, load_whole
from cfsp.selection.masks import without_attention
from cfsp.settings import AUTO_METRIC, DIVERGENCE, WHOLE_PARTS
from cfsp.streaming.runtime import fits
from cfsp.streaming.stand_in import CallForm, hidden_states_entering, resumed_at, skipped
from cfsp.streaming.work_dir import load_or_compute
from cfsp.text.windows import check_is_text

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cfsp.architecture.found import Unit
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.planning.candidate import DropSizes
    from cfsp.selection.divergence import DensePredictions
    from cfsp.settings import Budget
    from cfsp.streaming.runtime import Runtime
    from cfsp.streaming.work_dir import WorkDir
    from cfsp.text.windows import Windows

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

    Args:
        source: the dense model.
        model: the whole of it in memory, in evaluation mode.
        tokens_NT: windows without padding.
        wanted: how much goes, in one way or several; of the same parts.
        check: raises UnsupportedModelError where the model cannot do without these.
        on_removal: is called after each that is chosen.

    Raises:
        BudgetError: less goes than is wanted.
        UnsupportedModelError: the model cannot do without any of those that are left.
    """
    sizes, parts = wanted[0].sizes, wanted[0].parts
    among = parts if len(parts) > 1 else ()
    removed: list[Removal] = []
    gone, divergence = NOTHING, 0.0
    refusals: dict[Droppable, UnsupportedModelError] = {}
    # What each added to the divergence when it was last tried.
    added: dict[Droppable, float] = {}
    with torch.inference_mode():
        skipping = _SkippingModel.of(source, model, tokens_NT)
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
                    added[cheapest] = skipping.divergence_without(gone, cheapest) - divergence
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
            skipping.remove(gone)
    if not all(each.is_met_by(gone) for each in wanted):
        raise next(
            iter(refusals.values()),
            BudgetError(
                f"of {source.label} no more than {gone.in_words or 'nothing'} can go together; "
                "remove less"
            ),
        )
    return removed


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


def follow_divergence(source: WeightSource, removal: str, runtime: Runtime) -> bool:
    """Return whether blocks or attentions go by what the predictions lose.

    Where the choice is `auto`, they do if the whole model fits into memory.
    """
    return fits(source, runtime) if removal == AUTO_METRIC else removal == DIVERGENCE


def check_can_be_compared(
    source: WeightSource, budget: Budget, removal: str, runtime: Runtime
) -> None:
    """Check that what is compared with other parts, or in number, goes by what predictions lose.

    Raises:
        UsageError: it does not.
    """
    if not budget.whole_parts or len(budget.parts) == 1:
        return
    if follow_divergence(source, removal, runtime):
        return
    if budget.whole_parts == WHOLE_PARTS:
        raise UsageError(NEEDS_PREDICTIONS)
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
    place: WorkDir,
) -> Statistics:
    """Add the order in which blocks or attentions go, where budgets need more of it.

    A killed run goes on with what it had chosen. Of several processes the first chooses.

    Args:
        source: the model.
        statistics: of its calibration.
        windows: the calibration text, of which the beginnings of a few are read.
        wanted: how much goes by what the predictions lose, in one way or several.
        runtime: where and in what to compute.
        place: where the choice is kept.

    Raises:
        BudgetError: the budget can't be met.
        UsageError: the model does not fit into memory, or the windows have images.
        UnsupportedModelError: the model cannot do without enough of its blocks.
    """
    missing = [each for each in wanted if each.first(statistics.removals_of(each.parts)) is None]
    if not missing:
        return statistics
    needed = {each.parts for each in missing}

    def measure() -> dict[str, Any]:
        removals: list[Removal] = []
        for parts in sorted(needed):
            check_is_text(windows, f"--parts {','.join(parts)}")
            with place.watch.stage("order of removal"):
                budgets = [each for each in missing if each.parts == parts]
                removals += measure_order(source, windows, budgets, runtime)
        return {"removals": [each.to_json() for each in removals]}

    # Other windows would be another choice.
    name = f"removals-{windows.digest[:8]}"
    found = place.team.from_first(lambda: load_or_compute(place, name, measure)["removals"])
    others = [each for each in statistics.removals if (each.among or (each.part,)) not in needed]
    measured = Removal.all_from_json(found, len(statistics.blocks))
    return replace(statistics, removals=(*others, *measured))


def measure_order(
    source: WeightSource, windows: Windows, wanted: Sequence[DropBudget], runtime: Runtime
) -> list[Removal]:
    """Return what goes, in the order in which it is chosen, on a little of the text.

    Args:
        source: the model.
        windows: the calibration text.
        wanted: how much goes, in one way or several; of the same part.
        runtime: where and in what to compute.

    Raises:
        UsageError: the model does not fit into memory.
        UnsupportedModelError: the model cannot do without enough of its blocks.
    """
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


class _SkippingModel:
    """A whole model that runs without some of its parts, on the same windows again and again."""

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: nn.ModuleList,
        form: CallForm,
        dense: Sequence[DensePredictions],
        attentions: Mapping[int, Unit],
    ) -> None:
        self._blocks, self._attentions = blocks, attentions
        self._model, self._form, self._dense = model, form, dense
        self._entering: list[list[Tensor]] = []
        self.remove(NOTHING)
        self._resumes = can_resume(model, blocks, self._entering[0][-1], form, dense[0])

    @staticmethod
    def of(source: WeightSource, model: PreTrainedModel, tokens_NT: Tensor) -> _SkippingModel:
        """Run the dense model."""
        blocks = blocks_of(model, source.architecture)
        attentions = {unit.block: unit for unit in source.units if unit.part == "kv"}
        form = call_form_of(model, blocks)
        batches = torch.split(tokens_NT, _WINDOWS_IN_BATCH)
        dense = [dense_predictions(model, each) for each in batches]
        return _SkippingModel(model, blocks, form, dense, attentions)

    @contextmanager
    def _without(self, gone: Dropped) -> Iterator[None]:
        """Let the model run without these."""
        with ExitStack() as stack:
            for block in gone.attentions:
                unit = self._attentions[block]
                stack.enter_context(without_attention(self._blocks[block], unit))
            stack.enter_context(skipped(self._blocks, gone.blocks, self._form))
            yield

    def remove(self, gone: Dropped) -> None:
        """Note what enters every block when some are gone."""
        self._entering = []
        for dense in self._dense:
            with self._without(gone), hidden_states_entering(self._blocks) as entering_L:
                dense.divergence(self._model)
            self._entering.append(entering_L)

    def divergence_without(self, gone: Dropped, candidate: Droppable) -> float:
        """Return KL(dense || without these); infinite where the model does not run.

        Args:
            gone: what is removed already.
            candidate: what goes as well.
        """
        part, block = candidate
        # A block without its attention computes, one that is gone does not.
        first = block + (part == "blocks") if self._resumes else 0
        total, windows = 0.0, 0
        for dense, entering_L in zip(self._dense, self._entering, strict=True):
            with (
                self._without(gone.plus(candidate)),
                resumed_at(self._blocks, first, entering_L[block], self._form),
            ):
                try:
                    divergence = dense.divergence(self._model)
                except Exception:  # however a model misses what a block leaves to others
                    return math.inf
            total += divergence * len(dense.tokens_BT)
            windows += len(dense.tokens_BT)
        return total / windows if math.isfinite(total) else math.inf

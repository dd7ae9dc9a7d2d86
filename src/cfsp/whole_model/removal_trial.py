"""How many whole blocks, attentions or experts go where other parts may go as well, by a trial.

For each number that is tried (`cfsp.planning.numbers_to_try`) the blocks are skipped, the channels
and experts that a plan would remove of the others are masked, and the predictions are compared with
the dense model's. What is compared is the whole, not a sum of damages that were measured apart:
parts that are hardly missed alone are missed together (LOG.md).

Numbers of experts end after two in a row that are no better.

Repair wins back more of what channels lose than of what blocks or KV groups do. Where there will be
one, a few of the numbers are therefore repaired on a little text and compared again.

Shapes: N windows, T tokens, U units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.skeleton import blocks_of
from cfsp.engine.resumed_forward import skipped
from cfsp.engine.workplace import kept
from cfsp.errors import BudgetError
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.channels import channels_that_stay
from cfsp.planning.numbers_to_try import (
    aim_at_parameters,
    channels_to_try,
    counts_to_try,
    too_much,
)
from cfsp.planning.removal import first_removals
from cfsp.planning.removal_budget import RemovedWhole, whole_in_words, with_counts
from cfsp.planning.widths import plan_widths
from cfsp.progress import item_progress
from cfsp.settings import UNIT_PARTS
from cfsp.whole_model.divergence import dense_predictions, few_beginnings
from cfsp.whole_model.load import call_form_of, load_whole
from cfsp.whole_model.masks import masked_unit
from cfsp.whole_model.removal_order import check_can_be_compared, with_needed_removals
from cfsp.whole_model.sensitivity import with_needed_sensitivity

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.numbers_to_try import Aim
    from cfsp.settings import Budget, Part, PruneSettings
    from cfsp.text.windows import Windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A number of blocks and attentions that was tried, beside one of experts.

    Attributes:
        count: how many blocks and attentions go, the first in their order.
        removed: what goes whole with that.
        parts: whose channels go of the others; none where none may go.
        sparsity: share of what these channels own that goes.
        divergence: KL(dense || pruned, not repaired), in nats per token.
        repaired: the same after a repair on a little text; None where it was not tried.
    """

    count: int
    removed: RemovedWhole
    parts: tuple[Part, ...]
    sparsity: float
    divergence: float
    repaired: float | None = None

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Trial:
        """Return the trial whose fields were written as JSON types."""
        return Trial(
            **{
                **fields,
                "removed": RemovedWhole.from_json(fields["removed"]),
                "parts": tuple(fields["parts"]),
            }
        )

    def budget(self, asked: Budget) -> Budget:
        """Return the budget that says how many go whole, and which share of others' channels."""
        whole = (part for part in asked.parts if part not in UNIT_PARTS)
        counted = with_counts(asked, self.removed)
        return replace(counted, parts=(*self.parts, *whole), sparsity=self.sparsity)

    def in_words(self, asked: Budget) -> str:
        """Return what goes of the parts of a budget."""
        what = self.removed.counted(asked)
        if not self.parts:
            return what
        channels = channels_in_words(self.parts)
        return f"{what} and {100 * self.sparsity:.1f}% of the {channels} of the others"


def with_removal_count(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    place: Workplace,
    repaired: Callable[[Statistics, Budget], float] | None = None,
    aim: Aim | None = None,
) -> tuple[PruneSettings, Statistics]:
    """Return the settings with a number of what goes whole, and the statistics with what it took.

    Both stay as they are where the budget does not leave the number open.

    A killed run goes on with what it had chosen. Of several processes the first chooses.

    Args:
        source: the model.
        statistics: of a calibration, on a little text at least.
        windows: the calibration text, of which the beginnings of a few are read.
        settings: how to prune.
        engine: where and in what to compute.
        place: where the choice is kept.
        repaired: gives the same divergence after repair; None where nothing will be repaired.
        aim: what all numbers have in common; None for the parameters that the budget says.

    Raises:
        BudgetError: no number of blocks meets the budget.
        UsageError: the model does not fit into memory.
    """
    budget = settings.budget
    if not budget.leaves_number_open:
        return settings, statistics
    check_can_be_compared(source, [settings], engine)
    aim = aim or aim_at_parameters(source, budget)
    removing = [replace(settings, budget=alone) for alone in aim.alone.values()]
    statistics = with_needed_removals(source, statistics, windows, removing, engine, place)
    if budget.removes_channels:
        statistics = with_needed_sensitivity(source, statistics, windows, settings, engine, place)
    statistics_of = {
        experts: _with_order_for(source, statistics, alone) for experts, alone in aim.alone.items()
    }
    name = f"{whole_in_words(budget).replace(' ', '-')}-{windows.digest[:8]}"

    def measure() -> dict[str, Any]:
        trials = tried(source, statistics_of, windows, settings, engine, aim)
        return {"trials": [asdict(each) for each in trials]}

    def compare() -> list[Trial]:
        trials = [Trial.from_json(each) for each in kept(place, name, measure)["trials"]]
        if repaired is None:
            return trials
        few = worth_a_repair(trials)
        return [
            _when_repaired(each, statistics_of, budget, repaired, place, name)
            if each in few
            else each
            for each in trials
        ]

    with place.watch.stage("try"):
        trials = place.team.from_first(compare)
    best = best_of(trials)
    _tell(trials, best, budget)
    return replace(settings, budget=best.budget(budget)), statistics_of[best.removed.experts]


def _with_order_for(source: WeightSource, statistics: Statistics, alone: Budget) -> Statistics:
    """Return statistics with as much of the order of removal as a budget takes.

    No more of one that was measured for more: a plan takes the first of it.
    """
    first = first_removals(source, statistics, alone) if alone.whole_parts else None
    return replace(statistics, removals=tuple(first or ()))


def _when_repaired(
    trial: Trial,
    statistics_of: Mapping[int, Statistics],
    budget: Budget,
    repaired: Callable[[Statistics, Budget], float],
    place: Workplace,
    name: str,
) -> Trial:
    """Return a trial that was repaired as well, now or before a kill."""
    experts = trial.removed.experts
    log.info("repairing on a little text: %s", trial.in_words(budget))
    found = kept(
        place,
        f"{name}-repaired-{experts}-{trial.count}-{'-'.join(trial.parts)}",
        lambda: {"repaired": repaired(statistics_of[experts], trial.budget(budget))},
    )
    return replace(trial, **found)


def _tell(trials: Sequence[Trial], best: Trial, budget: Budget) -> None:
    """Tell people what was tried."""
    for trial in trials:
        log.info(
            "%s: divergence %.4f%s%s",
            trial.in_words(budget),
            trial.divergence,
            "" if trial.repaired is None else f", {trial.repaired:.4f} repaired",
            " (chosen)" if trial is best else "",
        )


def best_of(trials: Sequence[Trial]) -> Trial:
    """Return the trial whose predictions are nearest to the dense model's.

    Only those that were repaired count, if some were.
    """
    repaired = [(each.repaired, each) for each in trials if each.repaired is not None]
    if not repaired:
        return _nearest(trials)
    return min(repaired, key=lambda pair: pair[0])[1]


def worth_a_repair(trials: Sequence[Trial]) -> list[Trial]:
    """Return the few that may be the best after repair.

    For each choice of channels: the best before it, the one with the fewest blocks or attentions
    gone, because repair wins back more of what channels lose, and the one in the middle between.
    The same of the best with each number of experts.
    """
    few: list[Trial] = []
    for parts in dict.fromkeys(trial.parts for trial in trials):
        beside: dict[int, list[Trial]] = {}
        for trial in trials:
            if trial.parts == parts:
                beside.setdefault(trial.removed.experts, []).append(trial)
        bests = [_nearest(alike) for alike in beside.values()]
        best = _nearest(bests)
        for alike in (beside[best.removed.experts], bests):
            last = alike.index(best)
            few += [alike[index] for index in sorted({0, last // 2, last})]
    return list(dict.fromkeys(few))


def _nearest(trials: Iterable[Trial]) -> Trial:
    """Return the trial whose predictions are the nearest before repair; of equal ones the first."""
    return min(trials, key=lambda trial: trial.divergence)


def tried(
    source: WeightSource,
    statistics_of: Mapping[int, Statistics],
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    aim: Aim,
) -> list[Trial]:
    """Measure every number of blocks, attentions and experts that may be the best one.

    Args:
        source: the model.
        statistics_of: with each number of experts that may go of each block, ascending; in the
            order of their removals blocks and attentions may go beside these experts.
        windows: the calibration text.
        settings: how to prune.
        engine: where and in what to compute.
        aim: what all numbers have in common.

    Raises:
        BudgetError: none is possible.
    """
    budget, criterion = settings.budget, settings.criterion
    model = load_whole(source, engine, f"choosing how many {whole_in_words(budget)} go")
    masked = _MaskedModel(source, model, few_beginnings(windows).tokens_NT)
    choices = channels_to_try(budget)
    first, *_ = statistics_of.values()
    total = (len(first.removals) + len(statistics_of)) * len(choices)
    trials: list[Trial] = []
    with item_progress("choosing how many", total, "number") as bar:

        def measured(parts: tuple[Part, ...], experts: int, count: int) -> Trial | None:
            statistics = statistics_of[experts]
            removed = RemovedWhole.of(statistics.removals[:count], experts)
            sparsity = aim.share(statistics, parts, removed)
            if sparsity >= 1:
                return None  # the others do not own so much
            trial = Trial(count, removed, parts, sparsity, 0.0)
            try:
                rest = trial.budget(budget)
                widths = plan_widths(source, statistics, rest, criterion, removed)
            except BudgetError:
                return None  # or cannot lose it
            kept_U = list(channels_that_stay(source, statistics, widths, criterion, removed))
            bar.update()
            return replace(trial, divergence=masked.divergence(removed.blocks, kept_U))

        for parts in choices:
            trials += _of_one_choice(budget, statistics_of, partial(measured, parts))
    if not trials:
        raise too_much(budget)
    return trials


def _of_one_choice(
    budget: Budget,
    statistics_of: Mapping[int, Statistics],
    measured: Callable[[int, int], Trial | None],
) -> list[Trial]:
    """Measure the numbers that may be the best one, with channels of the same parts.

    Args:
        budget: what may go.
        statistics_of: as in `tried`.
        measured: tries a number of experts and one of blocks and attentions; None where the budget
            is not met with them.
    """
    trials: list[Trial] = []
    bests: list[float] = []
    for experts, statistics in statistics_of.items():
        alike: list[Trial] = []
        removals = statistics.removals
        best = _nearest(trials).count if trials else None
        for count in counts_to_try(budget, len(removals), best):
            alone = removals[count - 1].divergence if count else 0.0
            if any(alone > trial.divergence for trial in (*trials, *alike)):
                break  # whatever else goes as well makes it worse, and so does another one
            if trial := measured(experts, count):
                alike.append(trial)
        trials += alike
        bests += [_nearest(alike).divergence] if alike else []
        if len(bests) > 2 and min(bests[-2:]) >= min(bests[:-2]):
            break
    return trials


class _MaskedModel:
    """A whole model that runs without some of its blocks and channels, on the same windows."""

    def __init__(self, source: WeightSource, model: PreTrainedModel, tokens_NT: Tensor) -> None:
        self._source, self._model = source, model
        self._blocks = blocks_of(model, source.architecture)
        self._form = call_form_of(model, self._blocks)
        with torch.inference_mode():
            self._dense = [dense_predictions(model, tokens_T[None]) for tokens_T in tokens_NT]

    def divergence(self, removed: Collection[int], kept_U: Sequence[Sequence[int]]) -> float:
        """Return KL(dense || without these blocks and channels), the mean over windows."""
        with torch.inference_mode(), ExitStack() as stack:
            for unit, kept_K in zip(self._source.units, kept_U, strict=True):
                if unit.block not in removed and len(kept_K) < unit.width * unit.ffns:
                    stack.enter_context(masked_unit(self._blocks[unit.block], unit, kept_K))
            stack.enter_context(skipped(self._blocks, removed, self._form))
            return sum(each.divergence(self._model) for each in self._dense) / len(self._dense)

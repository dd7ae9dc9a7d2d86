"""How many whole blocks, attentions or experts go where other parts may go as well.

Every number of blocks leaves less to take from the channels. Each is tried: its blocks are skipped,
the channels that a plan would remove of the others are masked, and the predictions are compared
with the dense model's. What is compared is the whole, not a sum of damages that were measured
apart: parts that are hardly missed alone are missed together (LOG.md).

Where KV groups may go as well as FFN channels, each number is tried with them and without.

Where it is open how many experts go, it is tried from none upwards, masked as well: with the first
number every number of blocks, with each further one none of them and those next to the best so far.
It ends after two numbers in a row that are no better. Without channels the budget says how many
blocks go beside so many experts.

Repair wins back more of what channels lose than of what blocks or KV groups do. Where there will be
one, a few of the numbers are therefore repaired on a little text and compared again.

Shapes: N windows, T tokens, U units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.engine.resumed_forward import skipped
from cfsp.engine.workplace import kept
from cfsp.errors import BudgetError
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.experts import numbers_to_try
from cfsp.planning.make import choose_channels, model_size, plan_widths
from cfsp.planning.removal import first_removals
from cfsp.planning.removal_budget import (
    RemovedWhole,
    WholeSizes,
    parameters_with_experts,
    whole_in_words,
)
from cfsp.progress import item_progress
from cfsp.settings import MOST_REMOVED, UNIT_PARTS
from cfsp.whole_model.divergence import dense_predictions
from cfsp.whole_model.load import call_form_of, load_whole
from cfsp.whole_model.masks import masked_unit
from cfsp.whole_model.removal_order import check_can_be_compared, with_needed_removals
from cfsp.whole_model.sensitivity import few_beginnings, with_needed_sensitivity

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cfsp.calibration.statistics import Removal, Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.settings import Budget, Criterion, Part, PruneSettings
    from cfsp.text.windows import Windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A number of blocks and attentions that was tried, and one of experts.

    Attributes:
        removed: how many blocks and attentions go, the first in their order.
        sparsity: share of what the channels of the others own that goes with them.
        divergence: KL(dense || pruned, not repaired), in nats per token.
        parts: of what the channels are; none where none may go.
        experts: how many go of each block.
        repaired: the same divergence after a repair on a little text; None where it was not tried.
    """

    removed: int
    sparsity: float
    divergence: float
    parts: tuple[Part, ...]
    experts: int = 0
    repaired: float | None = None

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Trial:
        """Return what was written as JSON types."""
        return Trial(**{**fields, "parts": tuple(fields["parts"])})

    def in_words(self, what: str) -> str:
        """Return what goes, for people.

        Args:
            what: goes whole, and how much of it.
        """
        if not self.parts:
            return what
        channels = channels_in_words(self.parts)
        share = f"{100 * self.sparsity:.1f}% of the {channels} of the others"
        return f"{what} and {share}"


@dataclass(frozen=True)
class Aim:
    """What is kept equal between numbers of blocks, attentions and experts that are compared.

    Attributes:
        alone: gives the budget by which as many blocks or attentions go as may be tried beside so
            many experts.
        share: gives, from statistics, parts and what goes whole, the share that channels of these
            parts lose of what stays; 1 or more where that is not enough.
        experts: how many of each block may go, ascending.
    """

    alone: Callable[[int], Budget]
    share: Callable[[Statistics, tuple[Part, ...], RemovedWhole], float]
    experts: Sequence[int] = (0,)


def half_alone(budget: Budget) -> Budget:
    """Return the budget by which as many blocks or attentions go as are ever compared."""
    return replace(budget.without_channels(), sparsity=MOST_REMOVED, of="ffn")


def whole_alone(source: WeightSource, budget: Budget, experts: int = 0) -> Budget:
    """Return the budget by which as many blocks or attentions go as may be tried.

    One that does not leave the number open stays as it is.

    Args:
        source: the model.
        budget: how much goes.
        experts: how many go of each block, where the budget does not say it.
    """
    if not budget.leaves_number_open:
        return budget
    alone = budget.without_channels()
    if budget.leaves_experts_open:
        alone = replace(alone, remove_experts=experts)
    elif budget.removes_blocks:
        return alone
    if not budget.whole_parts:
        return alone
    experts = alone.remove_experts or 0
    sizes = WholeSizes.of(source, budget.whole_parts, experts)
    is_all = budget.removes_blocks or not budget.removes_channels
    most = sizes.most / sizes.total if is_all else MOST_REMOVED
    share = max(0.0, _to_go(source, budget, experts) / sizes.total)
    return replace(alone, sparsity=min(share, most), of="ffn")


def aim_at_parameters(source: WeightSource, budget: Budget) -> Aim:
    """Return the aim that the sparsity of a budget is: so many parameters go."""
    experts = [budget.remove_experts or 0]
    if budget.leaves_experts_open:
        experts = numbers_to_try(source, _to_go(source, budget, 0))
    return Aim(
        lambda experts: whole_alone(source, budget, experts),
        lambda _, parts, removed: _sparsity_of_others(source, budget, parts, removed),
        experts,
    )


def check_others_own_enough(source: WeightSource, budget: Budget) -> None:
    """Check that the other parts own what is left to go beside as many experts as are tried.

    Raises:
        BudgetError: they do not.
    """
    most = aim_at_parameters(source, budget).experts[-1]
    if _to_go(source, budget, most) >= _owned(source, budget, most):
        raise _too_much(budget)


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
    alone = {experts: aim.alone(experts) for experts in aim.experts}
    removing = [replace(settings, budget=each) for each in alone.values()]
    statistics = with_needed_removals(source, statistics, windows, removing, engine, place)
    if budget.removes_channels:
        statistics = with_needed_sensitivity(source, statistics, windows, settings, engine, place)
    removals_of: dict[int, list[Removal]] = {
        experts: (budget.whole_parts and first_removals(source, statistics, each)) or []
        for experts, each in alone.items()
    }

    def whole(trial: Trial) -> RemovedWhole:
        return RemovedWhole.of(removals_of[trial.experts][: trial.removed], trial.experts)

    def measured_for(trial: Trial) -> Statistics:
        # No more of an order that was measured for more: a plan takes the first of it.
        return replace(statistics, removals=tuple(removals_of[trial.experts]))

    def in_words(trial: Trial) -> str:
        return trial.in_words(whole(trial).counted(budget))

    def measure() -> dict[str, Any]:
        trials = _try(source, statistics, windows, settings, engine, aim, removals_of)
        return {"trials": [vars(each) for each in trials]}

    def when_repaired(trial: Trial) -> Trial:
        assert repaired is not None
        again, rest = repaired, _budget_with(budget, trial, whole(trial))
        log.info("repairing on a little text: %s", in_words(trial))
        number = f"{name}-repaired-{trial.experts}-{trial.removed}-{'-'.join(trial.parts)}"
        found = kept(place, number, lambda: {"repaired": again(measured_for(trial), rest)})
        return replace(trial, **found)

    def compare() -> list[dict[str, Any]]:
        trials = [Trial.from_json(each) for each in kept(place, name, measure)["trials"]]
        few = worth_a_repair(trials) if repaired is not None else []
        return [vars(when_repaired(each) if each in few else each) for each in trials]

    name = f"{whole_in_words(budget).replace(' ', '-')}-{windows.digest[:8]}"
    trials = [Trial.from_json(each) for each in place.team.from_first(compare)]
    best = best_of(trials)
    for trial in trials:
        log.info(
            "%s: divergence %.4f%s%s",
            in_words(trial),
            trial.divergence,
            "" if trial.repaired is None else f", {trial.repaired:.4f} repaired",
            " (chosen)" if trial is best else "",
        )
    chosen = _budget_with(budget, best, whole(best))
    return replace(settings, budget=chosen), measured_for(best)


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
        own = [trial for trial in trials if trial.parts == parts]
        numbers = dict.fromkeys(trial.experts for trial in own)
        bests = [_nearest(each for each in own if each.experts == number) for number in numbers]
        best = _nearest(bests)
        for alike in ([each for each in own if each.experts == best.experts], bests):
            last = alike.index(best)
            few += [alike[index] for index in sorted({0, last // 2, last})]
    return list(dict.fromkeys(few))


def _nearest(trials: Iterable[Trial]) -> Trial:
    """Return the trial whose predictions are the nearest before repair; of equal ones the first."""
    return min(trials, key=lambda trial: trial.divergence)


def _budget_with(budget: Budget, trial: Trial, removed: RemovedWhole) -> Budget:
    """Return a budget that says how many go whole, and which share of the others' channels."""
    return replace(
        budget,
        remove_blocks=len(removed.blocks) if budget.removes_blocks else None,
        remove_attentions=len(removed.attentions) if "attention" in budget.parts else None,
        remove_experts=removed.experts if budget.removes_experts else None,
        parts=(*trial.parts, *(part for part in budget.parts if part not in UNIT_PARTS)),
        sparsity=trial.sparsity,
        of="ffn",
    )


def _choices_of_channels(budget: Budget) -> list[tuple[Part, ...]]:
    """Return of which parts channels may go: of all, or of FFNs alone."""
    parts = _channels(budget)
    return [("ffn",), parts] if len(parts) > 1 else [parts]


def _channels(budget: Budget) -> tuple[Part, ...]:
    return tuple(part for part in UNIT_PARTS if part in budget.parts)


def _counts(budget: Budget, most: int, best: Trial | None) -> Iterable[int]:
    """Return how many blocks and attentions are tried with a number of experts, ascending.

    Args:
        budget: whether channels may go.
        most: how many may go.
        best: of the trials with fewer experts.
    """
    if not budget.removes_channels:
        return [most]
    if best is None:
        return range(most + 1)
    near = {0, best.removed - 1, best.removed, best.removed + 1}
    return sorted(near.intersection(range(most + 1)))


def _try(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    aim: Aim,
    removals_of: Mapping[int, Sequence[Removal]],
) -> list[Trial]:
    """Measure every number of blocks, attentions and experts that may be the best one.

    Args:
        source: the model.
        statistics: of its calibration.
        windows: the calibration text.
        settings: how to prune.
        engine: where and in what to compute.
        aim: what all numbers have in common.
        removals_of: the blocks and attentions that may go beside so many experts, in their order.

    Raises:
        BudgetError: none is possible.
    """
    budget = settings.budget
    model = load_whole(source, engine, f"choosing how many {whole_in_words(budget)} go")
    masked = _MaskedModel(source, model, few_beginnings(windows).tokens_NT)

    def measured(parts: tuple[Part, ...], experts: int, count: int) -> Trial | None:
        removed = RemovedWhole.of(removals_of[experts][:count], experts)
        sparsity = aim.share(statistics, parts, removed)
        if sparsity >= 1:
            return None  # the others do not own so much
        trial = Trial(count, sparsity, 0.0, parts, experts)
        try:
            rest = _budget_with(budget, trial, removed)
            kept_U = _plan(source, statistics, rest, settings.criterion, removed)
        except BudgetError:
            return None  # or cannot lose it
        return replace(trial, divergence=masked.divergence(removed.blocks, kept_U))

    trials: list[Trial] = []
    choices = _choices_of_channels(budget)
    total = (len(removals_of[aim.experts[0]]) + len(aim.experts)) * len(choices)
    with item_progress("choosing how many", total, "number") as bar:
        for parts in choices:
            own: list[Trial] = []
            bests: list[float] = []
            for experts in aim.experts:
                alike: list[Trial] = []
                removals = removals_of[experts]
                for count in _counts(budget, len(removals), _nearest(own) if own else None):
                    alone = removals[count - 1].divergence if count else 0.0
                    if any(alone > trial.divergence for trial in (*own, *alike)):
                        break  # whatever else goes as well makes it worse, and so does another one
                    if trial := measured(parts, experts, count):
                        alike.append(trial)
                        bar.update()
                own += alike
                bests += [_nearest(alike).divergence] if alike else []
                if len(bests) > 2 and min(bests[-2:]) >= min(bests[:-2]):
                    break
            trials += own
    if not trials:
        raise _too_much(budget)
    return trials


def _too_much(budget: Budget) -> BudgetError:
    """Return the error that no number of what goes whole leaves little enough to the others."""
    beside = "with channels of the others" if budget.removes_channels else "together"
    return BudgetError(
        f"cannot remove so much: neither {whole_in_words(budget)} alone nor {beside} can so much "
        "go; remove less"
    )


def _sparsity_of_others(
    source: WeightSource, budget: Budget, parts: tuple[Part, ...], removed: RemovedWhole
) -> float:
    """Return the share of what channels of these parts of the others own that is still to go.

    Without such parts it is 1 if another block, or attention, would come closer.
    """
    sizes = WholeSizes.of(source, budget.whole_parts, removed.experts)
    missing = _to_go(source, budget, removed.experts) - sizes.parameters(removed)
    if not parts:
        return float(missing > sizes.largest / 2)
    return max(0.0, missing / _owned_by_channels(source, parts, removed))


def _to_go(source: WeightSource, budget: Budget, experts: int) -> float:
    """Return how many parameters are to go beside so many experts."""
    beside = parameters_with_experts(source, experts)
    if budget.of == "model":
        return budget.sparsity * parameter_count(source) - beside
    if not budget.leaves_experts_open:
        return budget.sparsity * _owned(source, budget, experts)
    total = _owned(source, budget, 0)
    if not budget.removes_blocks and "ffn" not in budget.parts:
        assert source.architecture.experts is not None
        total += parameters_with_experts(source, source.architecture.experts.count)
    return budget.sparsity * total - beside


def _owned(source: WeightSource, budget: Budget, experts: int) -> int:
    """Return the parameters of all that may go beside so many experts; channels are of blocks."""
    if not budget.whole_parts:
        return _owned_by_channels(source, _channels(budget), RemovedWhole(experts=experts))
    total = WholeSizes.of(source, budget.whole_parts, experts).total
    if not budget.removes_blocks and "ffn" in budget.parts:  # KV groups are of the attentions
        total += _owned_by_channels(source, ("ffn",), RemovedWhole(experts=experts))
    return total


def _owned_by_channels(source: WeightSource, parts: tuple[Part, ...], removed: RemovedWhole) -> int:
    """Return the parameters of channels of these parts beside what goes whole."""
    size = model_size(source, removed).of_parts(parts)
    return size.cost_of(size.width_U) * size.parameters_per_cost


def _plan(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    removed: RemovedWhole,
) -> list[tuple[int, ...]]:
    """Return the channels of every unit that stay."""
    widths = plan_widths(source, statistics, budget, criterion, removed)
    return [
        choose_channels(source, unit, statistics.units[unit], width, criterion, removed.experts)
        for unit, width in enumerate(widths.kept_U)
    ]


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

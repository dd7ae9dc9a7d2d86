"""How many whole blocks or attentions go where channels of the others may go as well.

Every number of blocks leaves less to take from the channels. Each is tried: its blocks are skipped,
the channels that a plan would remove of the others are masked, and the one whose predictions are
nearest to the dense model's is chosen. What is compared is the whole, not a sum of damages that
were measured apart: parts that are hardly missed alone are missed together (LOG.md).

Shapes: N windows, T tokens, U units.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.engine.resumed_forward import skipped
from cfsp.engine.workplace import kept
from cfsp.errors import BudgetError, UsageError
from cfsp.planning.block_budget import parameters_of_whole, whole_in_words
from cfsp.planning.make import choose_channels, model_size, plan_widths
from cfsp.progress import item_progress
from cfsp.settings import MOST_REMOVED
from cfsp.whole_model.block_choice import follow_divergence, with_needed_removals
from cfsp.whole_model.divergence import dense_predictions
from cfsp.whole_model.load import call_form_of, load_whole
from cfsp.whole_model.masks import masked_unit
from cfsp.whole_model.sensitivity import few_beginnings, with_needed_sensitivity

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.settings import Budget, Criterion, PruneSettings
    from cfsp.text.windows import Windows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """A number of blocks or attentions that was tried.

    Attributes:
        removed: how many go.
        sparsity: share of what the channels of the others own that goes with them.
        divergence: KL(dense || pruned, not repaired), in nats per token.
    """

    removed: int
    sparsity: float
    divergence: float


def with_block_count(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    place: Workplace,
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

    Raises:
        BudgetError: no number of blocks meets the budget.
        UsageError: the model does not fit into memory.
    """
    budget = settings.budget
    if not budget.leaves_number_open:
        return settings, statistics
    what = whole_in_words(budget)
    if not follow_divergence(source, settings.criterion, engine):
        raise UsageError(
            f"--parts {','.join(budget.parts)} tries how many {what} should go, which requires the "
            f"whole model in memory; say how many with --set remove_{what}=N"
        )

    alone = replace(settings, budget=_whole_alone(source, budget))
    statistics = with_needed_removals(source, statistics, windows, [alone], engine, place)
    statistics = with_needed_sensitivity(
        source, statistics, windows, settings.criterion, engine, place
    )

    def measure() -> dict[str, Any]:
        trials = _try(source, statistics, windows, settings, engine)
        return {"trials": [vars(each) for each in trials]}

    name = f"{what}-{windows.digest[:8]}"
    found = place.team.from_first(lambda: kept(place, name, measure)["trials"])
    trials = [Trial(**each) for each in found]
    best = min(trials, key=lambda trial: trial.divergence)
    for trial in trials:
        log.info(
            "%d %s and %.1f%% of what the others can lose: divergence %.4f%s",
            trial.removed,
            what,
            100 * trial.sparsity,
            trial.divergence,
            " (chosen)" if trial is best else "",
        )
    chosen = _budget_with(budget, best.removed, best.sparsity)
    return replace(settings, budget=chosen), statistics


def _whole_alone(source: WeightSource, budget: Budget) -> Budget:
    """Return the budget by which as many blocks or attentions go as may be tried."""
    if budget.removes_blocks:
        return replace(budget, parts=("blocks",))
    attentions = sum(parameters_of_whole(source, budget).values())
    share = budget.sparsity * _counted(source, budget) / attentions
    return replace(budget, parts=("attention",), sparsity=min(share, MOST_REMOVED), of="ffn")


def _budget_with(budget: Budget, removed: int, sparsity: float) -> Budget:
    """Return a budget that says how many go whole, and which share of the others' channels."""
    number: Any = {f"remove_{whole_in_words(budget)}": removed}
    return replace(budget, **number, sparsity=sparsity, of="ffn")


def _try(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
) -> list[Trial]:
    """Measure every number of blocks or attentions that may be the best one."""
    budget = settings.budget
    model = load_whole(source, engine, f"choosing how many {whole_in_words(budget)} go")
    masked = _MaskedModel(source, model, few_beginnings(windows).tokens_NT)
    removals = statistics.removals_of(budget.whole_part)
    trials: list[Trial] = []
    with item_progress("choosing how many", len(removals) + 1, "number") as bar:
        for count in range(len(removals) + 1):
            removed = sorted(each.block for each in removals[:count])
            alone = removals[count - 1].divergence if count else 0.0
            if trials and alone > min(trial.divergence for trial in trials):
                break  # whatever else goes as well makes it worse, and so does another one
            sparsity = _sparsity_of_others(source, budget, removed)
            if sparsity >= 1:
                continue  # the others do not own so much
            try:
                rest = _budget_with(budget, count, sparsity)
                kept_U = _plan(source, statistics, rest, settings.criterion, removed)
            except BudgetError:
                continue  # or cannot lose it
            blocks = removed if budget.removes_blocks else ()
            trials.append(Trial(count, sparsity, masked.divergence(blocks, kept_U)))
            bar.update()
    if not trials:
        raise BudgetError(
            f"cannot remove {budget.sparsity:.1%}: neither {whole_in_words(budget)} alone nor with "
            "channels of the others can so much go; remove less"
        )
    return trials


def _sparsity_of_others(source: WeightSource, budget: Budget, removed: Collection[int]) -> float:
    """Return the share of what the channels of the others own that is still to go."""
    parameters_of = parameters_of_whole(source, budget)
    missing = budget.sparsity * _counted(source, budget)
    missing -= sum(parameters_of[block] for block in removed)
    return max(0.0, missing / _owned_by_channels(source, budget, removed))


def _counted(source: WeightSource, budget: Budget) -> int:
    """Return the parameters that the sparsity of a budget is a share of."""
    if budget.of == "model":
        return parameter_count(source)
    total = sum(parameters_of_whole(source, budget).values())
    if budget.removes_blocks or "ffn" not in budget.parts:  # KV groups are of the attentions
        return total
    return total + _owned_by_channels(source, replace(budget, parts=("ffn", "attention")), ())


def _owned_by_channels(source: WeightSource, budget: Budget, removed: Collection[int]) -> int:
    """Return the parameters of the channels that a budget may remove beside what goes whole."""
    size = model_size(source, budget, removed).of_parts(budget.parts)
    return size.cost_of(size.width_U) * size.parameters_per_cost


def _plan(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    removed: Collection[int],
) -> list[tuple[int, ...]]:
    """Return the channels of every unit that stay."""
    widths = plan_widths(source, statistics, budget, criterion, removed)
    return [
        choose_channels(source, unit, statistics.units[unit], width, criterion)
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

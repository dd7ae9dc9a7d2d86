"""A budget tried with its repair, on a little text, judged by the dense model's predictions.

It is fitted on some kinds of text and judged by others, or else by other windows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.reading import LoadedModel
from cfsp.cut.in_memory import build_pruned_model
from cfsp.engine.whole import free_bytes, needed_bytes
from cfsp.engine.workplace import temporary_workplace
from cfsp.planning.make import make_plan
from cfsp.repair.ridge_step import repair_by_plan
from cfsp.repair.sequential import repair_gaps
from cfsp.text.windows import few_windows, joined
from cfsp.whole_model.divergence import dense_predictions, few_beginnings
from cfsp.whole_model.load import load_whole
from cfsp.whole_model.removal_trial import with_removal_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.numbers_to_try import Aim
    from cfsp.settings import Budget, PruneSettings
    from cfsp.text.windows import Windows
    from cfsp.whole_model.divergence import DensePredictions

# On as few windows as it is judged by a ridge fits noise, most of all where most channels go, and
# other parts seem cheaper than they are (LOG.md).
FITTED_WINDOWS = 36
# Kinds of text, or windows, so that there are two to fit on and two to judge by.
_LEAST_APART = 4

log = logging.getLogger(__name__)


def with_count_by_repair(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    settings: PruneSettings,
    engine: Engine,
    place: Workplace,
    aim: Aim | None = None,
) -> tuple[PruneSettings, Statistics]:
    """Choose how many blocks or attentions go, after repair where there will be one.

    Arguments, result and errors are those of `with_removal_count`.
    """
    # Not under a name: it holds the dense model.
    return with_removal_count(
        source,
        statistics,
        windows,
        settings,
        engine,
        place,
        divergence_when_repaired(source, windows, settings, engine),
        aim,
    )


def divergence_when_repaired(
    source: WeightSource, windows: Windows, settings: PruneSettings, engine: Engine
) -> Callable[[Statistics, Budget], float] | None:
    """Return a function that prunes by a budget, repairs by ridge, and compares the predictions.

    It gives KL(dense || repaired) in nats per token. The model and a pruned one are in memory
    meanwhile; None where there is no room for both, or no repair is asked for.

    Args:
        source: the model.
        windows: the calibration text.
        settings: by what channels and blocks are chosen, and what a workplace may take.
        engine: where and in what to compute.
    """
    if settings.repair == "none":
        return None
    if not has_room_for_two(source, engine):
        if settings.budget.leaves_number_open:
            log.warning("no memory for a pruned model beside the dense one: compared before repair")
        return None
    fit, judged = apart(windows)

    @cache
    def dense_and_predictions() -> tuple[PreTrainedModel, list[DensePredictions]]:
        model = load_whole(source, engine, "trying a repair")
        with torch.inference_mode():
            return model, [dense_predictions(model, each[None]) for each in judged.tokens_NT]

    def divergence(statistics: Statistics, budget: Budget) -> float:
        model, dense = dense_and_predictions()
        loaded = LoadedModel(model, settings.budget.parts)
        plan = make_plan(source, statistics, budget, settings.criterion)
        with temporary_workplace(settings.compute.memory_budget) as place:
            repaired = repair_by_plan(source, plan, statistics, fit, engine, place)
            if plan.has_gaps:
                repaired = repair_gaps(source, repaired, fit, engine, place)
            smaller = build_pruned_model(model, loaded, plan, repaired.tensors)
        smaller.to(dtype=model.dtype).eval()
        with torch.inference_mode():
            return sum(each.divergence(smaller) for each in dense) / len(dense)

    return divergence


def apart(windows: Windows) -> tuple[Windows, Windows]:
    """Return windows to fit on, and the beginnings of a few others to judge by.

    Of a text of many kinds these are of other kinds: what goes whole is made up for by less than
    what channels lose, on text that the repair has not seen the like of (LOG.md). Of fewer than
    four windows all are in both.
    """
    kinds = windows.by_source()
    if len(windows.tokens_NT) < _LEAST_APART:
        return windows, few_beginnings(windows)
    if len(kinds) < _LEAST_APART:
        kinds = [windows.part(slice(0, None, 2)), windows.part(slice(1, None, 2))]
    fitted, judged = kinds[::2], kinds[1::2]
    of_each = max(1, FITTED_WINDOWS // len(fitted))
    return joined([few_windows(kind, of_each) for kind in fitted]), few_beginnings(joined(judged))


def has_room_for_two(source: WeightSource, engine: Engine) -> bool:
    """Return whether there is memory for the model and for a pruned one beside it."""
    missing = 1 if isinstance(source, LoadedModel) else 2
    return missing * needed_bytes(source, engine.dtype) <= free_bytes(engine.device)

"""Scores of candidates: how far the pruned model's predictions are from the dense model's, in nats.

What is compared is the whole, not a sum of damages that were measured apart: parts that are hardly
missed alone are missed together (LOG.md). A candidate is masked on the model in memory; the few
best are also repaired on a little text, fitted on some kinds of text and judged by others, because
repair wins back more of what channels lose than of what blocks or KV groups do.

Shapes: N windows, T tokens, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.cut.in_memory import build_pruned_model
from cfsp.selection.divergence import dense_predictions, few_beginnings
from cfsp.selection.load import call_form_of, load_whole
from cfsp.selection.masks import masked_unit
from cfsp.streaming.runtime import free_bytes, needed_bytes
from cfsp.streaming.stand_in import skipped
from cfsp.streaming.work_dir import temporary_work_dir
from cfsp.text.windows import few_windows, joined

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.job import Job
    from cfsp.planning.candidate import Candidate
    from cfsp.planning.make import Planner
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.repair.result import PruningResult
    from cfsp.selection.divergence import DensePredictions
    from cfsp.streaming.runtime import Runtime
    from cfsp.streaming.stand_in import CallForm
    from cfsp.text.windows import Windows

    # Repairs by a plan on some windows.
    Repairer = Callable[[Job, Planner, PruningPlan, Windows], PruningResult]

# On as few windows as it is judged by a ridge fits noise, most of all where most channels go, and
# other parts seem cheaper than they are (LOG.md).
FITTED_WINDOWS = 36
# Of each window that candidates are masked on: what separates those that are worth a repair.
_MASKED_TOKENS = 128
# Kinds of text, or windows, so that there are two to fit on and two to judge by.
_LEAST_APART = 4


@dataclass(frozen=True)
class Masked:
    """The score before repair.

    Attributes:
        model: the whole dense model in memory, in evaluation mode.
        blocks: its own.
        form: how it takes hidden states from them.
        dense: what it predicts, taken before anything is masked.
    """

    model: PreTrainedModel
    blocks: nn.ModuleList
    form: CallForm
    dense: list[DensePredictions]

    @staticmethod
    def of(source: WeightSource, model: PreTrainedModel, windows: Windows) -> Masked:
        """Return the score by the predictions on some windows.

        Args:
            source: the dense model.
            model: the whole of it in memory, in evaluation mode.
            windows: beginnings of a few windows.
        """
        blocks = blocks_of(model, source.architecture)
        dense = dense_on(model, windows)
        return Masked(model, blocks, call_form_of(model, blocks), dense)

    def score(self, planner: Planner, candidate: Candidate) -> float:
        """Return KL(dense || without what goes), the mean over windows.

        Raises:
            BudgetError: so much cannot go.
        """
        widths = planner.widths(candidate)
        kept_U = list(planner.channels(candidate, widths))
        with torch.inference_mode(), ExitStack() as stack:
            gone = candidate.dropped.blocks
            for unit, kept_K in zip(planner.source.units, kept_U, strict=True):
                if unit.block not in gone and len(kept_K) < unit.width * unit.ffns:
                    stack.enter_context(masked_unit(self.blocks[unit.block], unit, kept_K))
            stack.enter_context(skipped(self.blocks, gone, self.form))
            return sum(each.divergence(self.model) for each in self.dense) / len(self.dense)


@dataclass(frozen=True)
class RepairedScore:
    """The score after a repair on a little text; the model and a pruned one are in memory.

    Attributes:
        job: what is pruned.
        fit: windows to fit on.
        judged: the beginnings of others to judge by.
        repair: repairs by a plan.
    """

    job: Job
    fit: Windows
    judged: Windows
    repair: Repairer

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_whole(self.job.source, self.job.runtime, "trying a repair")

    @cached_property
    def _dense(self) -> list[DensePredictions]:
        return dense_on(self._model, self.judged)

    def score(self, planner: Planner, candidate: Candidate) -> float:
        """Return KL(dense || repaired), the mean over windows."""
        model, plan = self._model, planner.plan(candidate)
        loaded = LoadedModel(model, self.job.budget.parts)
        with temporary_work_dir(self.job.settings.compute.memory_budget) as place:
            repaired = self.repair(self.job.at(place), planner, plan, self.fit)
            smaller = build_pruned_model(model, loaded, plan, repaired.tensors)
        smaller.to(dtype=model.dtype).eval()
        with torch.inference_mode():
            return sum(each.divergence(smaller) for each in self._dense) / len(self._dense)


def masked_score(source: WeightSource, runtime: Runtime, windows: Windows) -> Masked:
    """Return the score before repair, on the beginnings of a few windows.

    Raises:
        UsageError: the model does not fit into memory.
    """
    model = load_whole(source, runtime, "comparing plans")
    return Masked.of(source, model, few_beginnings(windows, _MASKED_TOKENS))


def dense_on(model: PreTrainedModel, windows: Windows) -> list[DensePredictions]:
    """Return what a model predicts on windows, which pass one at a time."""
    with torch.inference_mode():
        return [dense_predictions(model, tokens_T[None]) for tokens_T in windows.tokens_NT]


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


def has_room_for_two(source: WeightSource, runtime: Runtime) -> bool:
    """Return whether there is memory for the model and for a pruned one beside it."""
    missing = 1 if isinstance(source, LoadedModel) else 2
    return missing * needed_bytes(source, runtime.dtype) <= free_bytes(runtime.device)

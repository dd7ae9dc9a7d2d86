"""Scores of candidates: how far the pruned model's predictions are from the dense model's, in nats.

What is compared is the whole, not a sum of damages that were measured apart: parts that are hardly
missed alone are missed together (LOG.md). A candidate is masked on the model in memory; the few
best are also repaired on a little text, fitted on some kinds of text and judged by others, because
repair wins back more of what channels lose than of what blocks or KV groups do.

Shapes: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.reading import LoadedModel
from cfsp.cut.in_memory import build_pruned_model
from cfsp.selection.divergence import dense_predictions, few_beginnings, load_whole
from cfsp.selection.masks import MaskedModel
from cfsp.streaming.runtime import free_bytes, needed_bytes
from cfsp.streaming.work_dir import temporary_work_dir
from cfsp.text.windows import few_windows, joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.job import Job
    from cfsp.planning.candidate import Candidate
    from cfsp.planning.make import Planner
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.repair.result import PruningResult
    from cfsp.selection.divergence import DensePredictions
    from cfsp.streaming.runtime import Runtime
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


def masked_model(source: WeightSource, runtime: Runtime, windows: Windows) -> MaskedModel:
    """Return the model that candidates are masked on, on the beginnings of a few windows."""
    model = load_whole(source, runtime, "comparing plans")
    few = few_beginnings(windows, _MASKED_TOKENS)
    return MaskedModel(source, model, torch.split(few.tokens_NT, 1))


def masked_score(masked: MaskedModel, planner: Planner, candidate: Candidate) -> float:
    """Return KL(dense || without what goes), the mean over windows."""
    kept = enumerate(planner.channels(candidate, planner.widths(candidate)))
    return masked.divergence(candidate.dropped, dict(kept))


@dataclass(frozen=True)
class RepairedScore:
    """The score after a repair on a little text; the model and a pruned one are in memory."""

    job: Job
    fit: Windows  # to fit on
    judged: Windows  # the beginnings of others to judge by
    repair: Repairer

    @cached_property
    def _model(self) -> PreTrainedModel:
        return load_whole(self.job.source, self.job.runtime, "trying a repair")

    @cached_property
    def _dense(self) -> list[DensePredictions]:
        return [dense_predictions(self._model, token_T[None]) for token_T in self.judged.tokens_NT]

    def score(self, planner: Planner, candidate: Candidate) -> float:
        """Return KL(dense || repaired), the mean over windows."""
        model, plan = self._model, planner.plan(candidate)
        loaded = LoadedModel(model, self.job.budget.parts)
        with temporary_work_dir(self.job.settings.compute.memory_budget) as work_dir:
            repaired = self.repair(self.job.at(work_dir), planner, plan, self.fit)
            smaller = build_pruned_model(model, loaded, plan, repaired.tensors)
        smaller.to(dtype=model.dtype).eval()
        with torch.inference_mode():
            return sum(each.divergence(smaller) for each in self._dense) / len(self._dense)


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

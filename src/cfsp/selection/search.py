"""The search over plans: candidates that just meet a constraint, and the best of them by its score.

    one part, one share        one candidate, nothing is compared
    blocks or attentions       as many of their order as are enough
    channels beside these      for each number of what is dropped, the share of channels left over

Of several candidates all that may be best are masked, the few that are worth it repaired on a
little text, and of these the nearest to the dense model is taken.

A score is how far the pruned model's predictions are from the dense model's, in nats. What is
compared is the whole, not a sum of damages that were measured apart: parts that are hardly missed
alone are missed together (LOG.md). Repair is fitted on some kinds of text and judged by others,
because it wins back more of what channels lose than of what blocks or KV groups do.

Shapes: T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibration.statistics import Removal, Statistics
from cfsp.checkpoint.reading import LoadedModel, WeightSource
from cfsp.cut.surgery import build_pruned_model
from cfsp.errors import BudgetError, UsageError
from cfsp.job import Job
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.make import Planner
from cfsp.planning.plan_file import PruningPlan
from cfsp.progress import item_progress
from cfsp.repair.result import PruningResult
from cfsp.selection.by_statistics import dropped_by
from cfsp.selection.constraint import Constraint, Parameters, Share, drops_in_words
from cfsp.selection.divergence import (
    DensePredictions,
    dense_predictions,
    few_beginnings,
    load_whole,
)
from cfsp.selection.masks import MaskedModel
from cfsp.settings import Budget, Part
from cfsp.streaming.runtime import Runtime, free_bytes, needed_bytes
from cfsp.streaming.work_dir import load_or_compute, temporary_work_dir
from cfsp.text.windows import Windows, few_windows, joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
            smaller = build_pruned_model(loaded, plan, repaired.tensors)
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


# Of more numbers than these, those between are tried only beside the best.
_NUMBERS_AT_ONCE = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """A candidate with its scores, KL(dense || pruned), in nats per token."""

    candidate: Candidate
    masked: float  # before repair
    repaired: float | None = None  # after one on a little text, where that was tried


def only_candidate(constraint: Constraint, planner: Planner) -> Candidate | None:
    """Return the candidate that meets a constraint where nothing is open; None if some is."""
    budget = constraint.budget
    if budget.compares:
        return None
    if "experts" in budget.parts:
        experts = constraint.source.architecture.experts
        assert isinstance(constraint, Share | Parameters) and experts is not None
        gone = constraint.experts()
        return Candidate(experts=gone, sparsity=budget.sparsity or gone / experts.count)
    if not budget.whole_parts:
        share = constraint.share(planner, budget.channel_parts, Dropped())
        if share is None:
            raise constraint.too_much()
        return Candidate(parts=budget.channel_parts, sparsity=share)
    wanted = constraint.to_drop()
    dropped = dropped_by(planner.source, planner.statistics, wanted, constraint.enough)
    share = wanted.sizes.parameters(dropped) / wanted.sizes.total
    return Candidate(dropped, sparsity=budget.sparsity or share)


def select(
    job: Job, constraint: Constraint, statistics: Statistics, repair: Repairer | None
) -> tuple[Planner, Candidate]:
    """Return the best candidate, and what makes its plan.

    A killed run goes on with what it had compared. Of several processes the first compares. Windows
    are drawn only if something is compared; without `repair` nothing is repaired.
    """
    planner = Planner.of(job.source, statistics, job.budget, job.criterion)
    if only := only_candidate(constraint, planner):
        return planner, only
    order = constraint.to_drop().first(statistics.removals_of(job.budget.whole_parts)) or []
    name = f"{'-'.join(job.budget.parts)}-{job.windows().digest[:8]}"

    def masked() -> dict[str, Any]:
        found = _all_masked(job, constraint, planner, order)
        return {"candidates": [asdict(each) for each in found]}

    def compare() -> list[Scored]:
        found = [
            Scored(Candidate.from_json(each["candidate"]), each["masked"])
            for each in load_or_compute(job.work_dir, name, masked)["candidates"]
        ]
        score = _repaired_score(job, repair)
        few = [] if score is None else worth_a_repair(found)
        return [
            _when_repaired(job, name, each, planner, score) if score and each in few else each
            for each in found
        ]

    with job.work_dir.watch.stage("try"):
        found = job.work_dir.team.from_first(compare)
    best = best_of(found)
    for each in found:
        after = "" if each.repaired is None else f", {each.repaired:.4f} repaired"
        chosen = " (chosen)" if each is best else ""
        log.info("%s: divergence %.4f%s%s", each.candidate.in_words, each.masked, after, chosen)
    return planner, best.candidate


def _repaired_score(job: Job, repair: Repairer | None) -> RepairedScore | None:
    """Return the score after repair; None where there is none, or no room for it."""
    if repair is None:
        return None
    if not has_room_for_two(job.source, job.runtime):
        log.warning("no memory for a pruned model beside the dense one: compared before repair")
        return None
    return RepairedScore(job, *apart(job.windows()), repair)


def _when_repaired(
    job: Job, name: str, scored: Scored, planner: Planner, score: RepairedScore
) -> Scored:
    """Return a candidate that was repaired as well, now or before a kill."""
    candidate = scored.candidate
    log.info("repairing on a little text: %s", candidate.in_words)
    number = f"{len(candidate.dropped)}-{'-'.join(candidate.parts)}"
    found = load_or_compute(
        job.work_dir,
        f"{name}-repaired-{number}",
        lambda: {"repaired": score.score(planner, candidate)},
    )
    return replace(scored, **found)


def _all_masked(
    job: Job, constraint: Constraint, planner: Planner, order: Sequence[Removal]
) -> list[Scored]:
    """Score every number of what is dropped that may be the best one, before repair."""
    model = masked_model(job.source, job.runtime, job.windows())
    channels = job.budget.channel_parts
    choices = [("ffn",), channels] if len(channels) > 1 else [channels]
    found: list[Scored] = []
    with item_progress("choosing how many", len(choices) * len(order), "plan") as bar:
        for parts in choices:

            def scored(count: int, parts: tuple[Part, ...] = parts) -> Scored | None:
                dropped = Dropped.of(order[:count])
                share = constraint.share(planner, parts, dropped)
                if share is None:
                    return None  # the others do not own so much
                candidate = Candidate(dropped, 0, parts, share)
                bar.update()
                try:
                    return Scored(candidate, masked_score(model, planner, candidate))
                except BudgetError:
                    return None  # or cannot lose it

            found += _best_numbers([each.divergence for each in order], scored)
    if not found:
        raise constraint.too_much()
    return found


def _best_numbers(alone: Sequence[float], scored: Callable[[int], Scored | None]) -> list[Scored]:
    """Score numbers of what is dropped, ascending, where the best one is among them.

    Every number of few; of many those at even distances, then those around the best. `alone` has
    the divergence when the first, the first two, ... of the order go and nothing else; `scored`
    gives None where a number does not meet the constraint.
    """
    found: dict[int, Scored | None] = {}

    def best() -> float:
        return min((each.masked for each in found.values() if each), default=float("inf"))

    def try_all(counts: Iterable[int]) -> None:
        for count in counts:
            if count in found or not 0 <= count <= len(alone):
                continue
            if count and alone[count - 1] > best():
                return  # whatever else goes as well makes it worse, and so does another one
            found[count] = scored(count)

    step = 1
    while len(alone) / step > _NUMBERS_AT_ONCE:
        step *= 2
    try_all(range(0, len(alone) + 1, step))
    while step > 1:
        step //= 2
        middle = min(found, key=lambda count: getattr(found[count], "masked", float("inf")))
        try_all((middle - step, middle + step))
    return [each for _, each in sorted(found.items()) if each]


def best_of(found: Sequence[Scored]) -> Scored:
    """Return the candidate whose predictions are nearest to the dense model's.

    Only those that were repaired count, if some were.
    """
    repaired = [(each.repaired, each) for each in found if each.repaired is not None]
    if not repaired:
        return _nearest(found)
    return min(repaired, key=lambda pair: pair[0])[1]


def worth_a_repair(found: Sequence[Scored]) -> list[Scored]:
    """Return the few that may be the best after repair.

    For each choice of channels the best before it and the one with the least dropped, because
    repair wins back more of what channels lose; of a single choice also the one in the middle.
    """
    choices = dict.fromkeys(each.candidate.parts for each in found)
    few: list[Scored] = []
    for parts in choices:
        alike = [each for each in found if each.candidate.parts == parts]
        last = alike.index(_nearest(alike))
        wanted = {0, last} if len(choices) > 1 else {0, last // 2, last}
        few += [alike[index] for index in sorted(wanted)]
    return few


def _nearest(found: Sequence[Scored]) -> Scored:
    """Return the nearest before repair; of equal ones the first."""
    return min(found, key=lambda each: each.masked)


def check_is_definite(budget: Budget) -> None:
    """Check that what goes of a budget follows from statistics alone."""
    if budget.compares:
        raise UsageError(
            f"--parts {','.join(budget.parts)} tries how many {drops_in_words(budget.whole_parts)} "
            "should go, which requires the model and a text; make the plan with cfsp prune"
        )

"""The search over plans: candidates that just meet a constraint, and the best of them by its score.

    one part, one share        one candidate, nothing is compared
    blocks, attention layers   as many of their order as are enough
    channels beside blocks     for each number of what is dropped, the share of channels left over

A score is how far the predictions are from the dense model's, in nats. All candidates that may be
best are masked, the few that are worth it repaired on a little text. What is compared is the whole:
parts that are hardly missed alone are missed together (LOG.md). Repair is fitted on some kinds of
text and judged by others, because it wins back more of what channels lose than of what blocks do.

Shapes: T tokens.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from cfsp.calibration.statistics import Removal, Statistics
from cfsp.checkpoint.reading import LoadedModel
from cfsp.cut.surgery import build_pruned_model
from cfsp.errors import BudgetError
from cfsp.job import Job
from cfsp.planning.candidate import NOTHING, Candidate, Dropped
from cfsp.planning.make import Planner
from cfsp.progress import item_progress
from cfsp.repair.ladder import repair
from cfsp.repair.result import PruningResult
from cfsp.repair.ridge_pass import repair_by_plans
from cfsp.selection.constraint import Attempt, Constraint, Parameters, Share
from cfsp.selection.divergence import (
    MaskedModel,
    dense_predictions,
    few_beginnings,
    in_batches,
    load_whole,
)
from cfsp.selection.drop_order import gone_by
from cfsp.settings import Part
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows, few_windows, joined

# On as few windows as it is judged by a ridge fits noise, most of all where most channels go, and
# other parts seem cheaper than they are (LOG.md).
FITTED_WINDOWS = 36
# Of each window that candidates are masked on: what separates those that are worth a repair.
_MASKED_TOKENS = 128
# Kinds of text, or windows, so that there are two to fit on and two to judge by.
_LEAST_APART = 4
# Of more numbers than these, those between are tried only beside the best.
_NUMBERS_AT_ONCE = 8

log = logging.getLogger(__name__)


def masked_score(masked: MaskedModel, planner: Planner, candidate: Candidate) -> float:
    """Return KL(dense || without what goes), the mean over windows."""
    kept = enumerate(planner.channels(candidate, planner.widths(candidate)))
    return masked.divergence(candidate.dropped, dict(kept))


def can_be_repaired(job: Job) -> bool:
    """Return whether candidates are compared after repair; people are told if there is no room."""
    if job.settings.repair == "none":
        return False
    if not (has_room := job.fits(2)):
        log.warning("no memory for a pruned model beside the dense one: compared before repair")
    return has_room


def repaired_scores(job: Job, planner: Planner, candidates: Sequence[Candidate]) -> list[float]:
    """Return KL(dense || repaired on a little text) of each, with two models in memory."""
    fit, judged = apart(job.draw())
    model = load_whole(job.source, job.runtime, "trying a repair")
    with torch.inference_mode():
        predicted = [dense_predictions(model, token_T[None]) for token_T in judged.tokens_NT]

    def score(repaired: PruningResult) -> float:
        loaded = LoadedModel(model, job.budget.parts)
        smaller = build_pruned_model(loaded, repaired.plan, repaired.tensors)
        smaller.to(dtype=model.dtype).eval()
        with torch.inference_mode():
            return sum(each.divergence(smaller) for each in predicted) / len(predicted)

    log.info("repairing on a little text: %s", "; ".join(each.in_words for each in candidates))
    plans = [PruningResult(planner.plan(candidate)) for candidate in candidates]
    # What is repaired here is not to be gone on from.
    work_dir = WorkDir(job.work_dir.directory_of("try"), job.work_dir.memory_budget)
    own = replace(job, work_dir=work_dir, settings=replace(job.settings, repair="ridge"))
    scores = [score(repair(own, each, fit)) for each in repair_by_plans(own, plans, fit)]
    shutil.rmtree(work_dir.directory)
    return scores


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
        count = constraint.experts()
        return Candidate(experts=count, sparsity=budget.sparsity or count / experts.count)
    if budget.whole_part is None:
        share = constraint.share(planner, budget.channel_parts, NOTHING)
        if share is None:
            raise constraint.too_much()
        return Candidate(parts=budget.channel_parts, sparsity=share)
    wanted = constraint.to_drop()
    gone = gone_by(planner.source, planner.statistics, wanted)
    share = wanted.sizes.parameters(gone) / wanted.sizes.total
    return Candidate(wanted.dropped(gone), sparsity=budget.sparsity or share)


def select(job: Job, constraint: Constraint, statistics: Statistics) -> tuple[Planner, Candidate]:
    """Return the best candidate, compared after repair if there is one, and what makes its plan.

    A killed run goes on with what it had compared. Of several processes the first compares. Windows
    are drawn only if something is compared.
    """
    planner = Planner.of(job.source, statistics, job.budget, job.criterion)
    if only := only_candidate(constraint, planner):
        return planner, only
    known = {each.block: each for each in statistics.removals_of("blocks")}
    order = [known[block] for block in constraint.to_drop().taken(known)]
    name = f"scored-{'-'.join(job.budget.parts)}-{job.draw().digest[:8]}"

    repairs = can_be_repaired(job)

    def compare() -> dict[str, Any]:
        found = _all_masked(job, constraint, planner, order)
        if repairs:
            few = worth_a_repair(found)
            scores = repaired_scores(job, planner, [each.candidate for each in few])
            after_repair = dict(zip(few, scores, strict=True))
            found = [replace(each, repaired=after_repair.get(each)) for each in found]
        tried = [asdict(each) for each in constraint.tried]
        return {"scored": [asdict(each) for each in found], "tried": tried}

    with job.work_dir.watch.stage("try"):
        kept = job.work_dir.once(name, compare)
    constraint.tried[:] = [Attempt(**each) for each in kept.get("tried", ())]
    found = [
        Scored(Candidate.from_json(each["candidate"]), each["masked"], each["repaired"])
        for each in kept["scored"]
    ]
    best = best_of(found)
    for each in found:
        after = "" if each.repaired is None else f", {each.repaired:.4f} repaired"
        chosen = " (chosen)" if each is best else ""
        log.info("%s: divergence %.4f%s%s", each.candidate.in_words, each.masked, after, chosen)
    return planner, best.candidate


def _all_masked(
    job: Job, constraint: Constraint, planner: Planner, order: Sequence[Removal]
) -> list[Scored]:
    """Score every number of what is dropped that may be the best one, before repair."""
    model = load_whole(job.source, job.runtime, "comparing plans")
    few = few_beginnings(job.draw(), _MASKED_TOKENS)
    masked = MaskedModel(job.source, model, in_batches(few.tokens_NT), resumes=False)
    channels = job.budget.channel_parts
    choices = [("ffn",), channels] if len(channels) > 1 else [channels]
    found: list[Scored] = []
    with item_progress("choosing how many", len(choices) * (len(order) + 1), "plan") as bar:
        for parts in choices:

            def scored(count: int, parts: tuple[Part, ...] = parts) -> Scored | None:
                dropped = Dropped.of("blocks", (each.block for each in order[:count]))
                try:
                    share = constraint.share(planner, parts, dropped)
                    if share is None:
                        return None  # the others do not own so much
                    candidate = Candidate(dropped, 0, parts, share)
                    bar.update()
                    return Scored(candidate, masked_score(masked, planner, candidate))
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
    # The largest too, whatever the step: it may be the only one that meets the constraint.
    try_all((*range(0, len(alone), step), len(alone)))
    while step > 1:
        step //= 2
        middle = min(found, key=lambda count: getattr(found[count], "masked", float("inf")))
        try_all((middle - step, middle + step))
    return [each for _, each in sorted(found.items()) if each]


def best_of(found: Sequence[Scored]) -> Scored:
    """Return the nearest to the dense model; of those that were repaired, if some were."""
    repaired = {each.repaired: each for each in reversed(found) if each.repaired is not None}
    return repaired[min(repaired)] if repaired else min(found, key=lambda each: each.masked)


def worth_a_repair(found: Sequence[Scored]) -> list[Scored]:
    """Return the few that may be the best after repair.

    For each choice of channels the best before it and the one with the least dropped, because
    repair wins back more of what channels lose; of a single choice also the one in the middle.
    """
    choices = dict.fromkeys(each.candidate.parts for each in found)
    few: list[Scored] = []
    for parts in choices:
        alike = [each for each in found if each.candidate.parts == parts]
        last = alike.index(best_of(alike))
        wanted = {0, last} if len(choices) > 1 else {0, last // 2, last}
        few += [alike[index] for index in sorted(wanted)]
    return few

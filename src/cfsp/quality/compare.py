"""Two models compared window by window and document by document, beside the dense model.

Every difference is second - first. `cfsp.quality.paired` has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import eq
from typing import Any

from cfsp.errors import ReportError
from cfsp.quality.paired import (
    Estimate,
    difference,
    geometric_mean,
    mean,
    mean_of_tasks,
    per_count,
    rounded,
)
from cfsp.quality.results_file import MeasuredModel, Measures, answer_measures, hashes
from cfsp.quality.tasks.harness import ScoredDocument, losses_of

# A model whose accuracy is less than so many standard errors above a guess may be guessing.
_ERRORS_ABOVE_CHANCE = 2.0


@dataclass(frozen=True)
class Pair:
    """A measure of two models on the same windows or documents."""

    first: Estimate
    second: Estimate
    difference: Estimate  # the mean of the differences


@dataclass(frozen=True)
class TextPair:
    """Two models on one text; what needs a dense model is None without one."""

    windows: int
    loss: Pair  # negative log-likelihood per token in nats
    divergence: Pair | None = None  # KL(dense || model) per token in nats
    # Top-1 agreement: share of tokens whose most likely one is the dense one's.
    agreed: Pair | None = None


@dataclass(frozen=True)
class TaskPair:
    """Two models on one task, by one metric; what needs a dense model is None without one."""

    metric: str  # `acc_norm` where the task has it, else `acc`
    documents: int
    dense: Estimate | None  # the dense model's accuracy
    chance: float  # the accuracy of a guess
    is_above_chance: bool | None  # whether the dense model is better than that
    accuracy: Pair
    # Share of answers that are the dense model's, where one of several is picked.
    kept: Pair | None = None
    loss: Pair | None = None  # of a free continuation, in nats; None of other tasks


@dataclass(frozen=True)
class Comparison:
    """Two models compared; means are over the tasks on which the dense model beats a guess."""

    first: str
    second: str
    texts: dict[str, TextPair]
    tasks: dict[str, TaskPair]
    left_out: list[str]  # the tasks on which the dense model is not better than a guess
    accuracy: Pair | None
    kept: Pair | None
    questions: int  # how many both were asked
    answers: dict[str, Pair]  # how theirs differ, by measure (see `answer_measures`)

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types, rounded."""
        return asdict(self, dict_factory=rounded)


def compare(first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None) -> Comparison:
    """Compare two models on the texts, tasks and questions that both were measured on.

    The dense model may be one of them. Other windows or documents are refused.
    """
    texts = {
        text: _text_pair(text, first, second, dense)
        for text in first.windows
        if text in second.windows
    }
    tasks = {
        task: _task_pair(task, first, second, dense)
        for task in first.documents
        if task in second.documents
    }
    answers = _answer_pairs(first, second) if first.answers and second.answers else {}
    if not (texts or tasks or answers):
        raise ReportError(
            f"{first.name} and {second.name} have no text and no task in common, and no answers; "
            "measure both with the same --data or --tasks, or --answers"
        )
    left_out = [task for task, pair in tasks.items() if pair.is_above_chance is False]
    counted = [pair for task, pair in tasks.items() if task not in left_out]
    return Comparison(
        first.name,
        second.name,
        texts,
        tasks,
        left_out,
        _mean([pair.accuracy for pair in counted]),
        _mean([pair.kept for pair in counted if pair.kept is not None]),
        len(first.answers["documents"]) if answers else 0,
        answers,
    )


def agreement_of(dense: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return how far a model is from the dense one, by text and in sum."""
    by_text: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for text, sums in model["windows"].items():
        counts = sums["predicted"]
        rise = per_count(difference(dense["windows"][text]["loss"], sums["loss"]), counts)
        ratios[text] = math.exp(min(rise.value, 700.0))
        by_text[text] = {
            "perplexity_ratio": round(ratios[text], 6),
            "loss_rise": rise.to_json(),
            "divergence": per_count(sums["divergence"], counts).to_json(),
            "agreed": per_count(sums["agreed"], counts).to_json(),
        }
    found: dict[str, Any] = {
        "against": dense["model"],
        "fingerprint": dense["fingerprint"],
        "texts": by_text,
    }
    if ratios:
        worst = max(ratios, key=lambda text: ratios[text])
        found |= {
            "perplexity_ratio": round(geometric_mean(list(ratios.values())), 6),
            "worst": {"text": worst, "perplexity_ratio": round(ratios[worst], 6)},
        }
    return found


def comparisons(
    models: Sequence[MeasuredModel], dense: MeasuredModel | None, base: MeasuredModel | None
) -> list[Comparison]:
    """Compare all models with one, or with the dense one and then with the first of the others."""
    if base is not None:
        pairs = [(base, each) for each in models if each is not base]
    else:
        others = [each for each in models if each is not dense]
        pairs = [(dense, each) for each in others] if dense is not None else []
        pairs += [(others[0], each) for each in others[1:]]
    if not pairs:
        raise ReportError(
            "a comparison needs two models, found "
            f"{', '.join(each.name for each in models) or 'none'}; give another file, or measure "
            "with --against"
        )
    return [compare(first, second, dense) for first, second in pairs]


def _text_pair(
    text: str, first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None
) -> TextPair:
    one, other = first.windows[text], second.windows[text]
    if one["digest"] != other["digest"]:
        raise ReportError(
            f"{first.name} and {second.name} were measured on other windows of {text}: another "
            "tokenizer, --windows, --seqlen or --bos; measure both alike"
        )
    pairs = _pairs(*(_of_text(model, text, dense) for model in (first, second)))
    return TextPair(len(one["predicted"]), **pairs)


def _of_text(model: MeasuredModel, text: str, dense: MeasuredModel | None) -> Measures:
    """Return what was measured on a text; the dense model agrees with itself."""
    sums = model.windows[text]
    counts = sums["predicted"]
    found = {"loss": (sums["loss"], counts)}
    if dense is not None and model is dense:
        found |= {"divergence": ([0.0] * len(counts), counts), "agreed": (counts, counts)}
    elif dense is not None and model.against == dense.fingerprint:
        found |= {name: (sums[name], counts) for name in ("divergence", "agreed") if name in sums}
    return found


def _task_pair(
    task: str, first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None
) -> TaskPair:
    of_dense = None if dense is None else dense.documents.get(task)
    one, other = first.documents[task], second.documents[task]
    metric = "acc_norm" if all("acc_norm" in each for each in one) else "acc"
    for model in (second, dense):
        if model is not None and task in model.documents:
            _check_same_documents(task, metric, first, model)
    accuracy_of_dense = is_above = None
    if of_dense is not None:
        accuracy_of_dense = mean([each[metric] for each in of_dense])
        above = mean([each[metric] - each["chance"] for each in of_dense])
        is_above = above.value > _ERRORS_ABOVE_CHANCE * (above.stderr or 0.0)
    return TaskPair(
        metric,
        len(one),
        accuracy_of_dense,
        mean([each["chance"] for each in one]).value,
        is_above,
        **_pairs(*(_of_task(each, metric, of_dense) for each in (one, other))),
    )


def _of_task(
    documents: Sequence[ScoredDocument], metric: str, of_dense: Sequence[ScoredDocument] | None
) -> Measures:
    """Return what was measured on the documents of a task."""
    found = {"accuracy": [each[metric] for each in documents]}
    if of_dense is not None:
        name = "choice_norm" if metric == "acc_norm" else "choice"
        own, expected = (
            [each.get(name, each.get("answer")) for each in some] for some in (documents, of_dense)
        )
        if None not in (*own, *expected):  # there is something that can be the same
            found["kept"] = list(map(float, map(eq, own, expected)))
    if (losses := losses_of(documents)) is not None:
        found["loss"] = losses
    return {name: (values, [1] * len(documents)) for name, values in found.items()}


def _answer_pairs(first: MeasuredModel, second: MeasuredModel) -> dict[str, Pair]:
    one, other = first.answers, second.answers
    if one["digest"] != other["digest"]:
        raise ReportError(
            f"{first.name} and {second.name} were measured on other answers: of another dense "
            "model, to other questions, or by another --dtype; measure both alike"
        )
    return _pairs(answer_measures(one), answer_measures(other))


def _pairs(first: Measures, second: Measures) -> dict[str, Pair]:
    """Return the means of what was measured of both models, and of their differences.

    Sums are over as many tokens in both.
    """
    return {
        name: Pair(
            per_count(sums, counts),
            per_count(second[name][0], counts),
            per_count(difference(sums, second[name][0]), counts),
        )
        for name, (sums, counts) in first.items()
        if name in second
    }


def _check_same_documents(
    task: str, metric: str, first: MeasuredModel, second: MeasuredModel
) -> None:
    shots = [model.tasks.get(task, {}).get("shots") for model in (first, second)]
    if shots[0] != shots[1]:
        raise ReportError(
            f"{first.name} and {second.name} were scored on {task} with {shots[0]} and {shots[1]} "
            "shots; score both with the same --shots"
        )
    one, other = first.documents[task], second.documents[task]
    if len(one) != len(other):
        raise ReportError(
            f"{first.name} and {second.name} were scored on {len(one)} and {len(other)} documents "
            f"of {task}; score both with the same --limit"
        )
    if hashes(one) != hashes(other):
        raise ReportError(
            f"{first.name} and {second.name} were scored on other documents of {task}; score both "
            "with the same --task-data"
        )
    if any(metric not in each for each in other):
        raise ReportError(
            f"{first.name} and {second.name} were scored on {task} by other metrics, perhaps by "
            "another version of the harness; score both alike"
        )


def _mean(pairs: Sequence[Pair]) -> Pair | None:
    if not pairs:
        return None
    sides = ("first", "second", "difference")
    return Pair(*(mean_of_tasks([getattr(pair, side) for pair in pairs]) for side in sides))

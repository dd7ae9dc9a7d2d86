"""Two models compared window by window and document by document, beside the dense model.

Every difference is second - first. `cfsp.quality.paired` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

from cfsp.errors import ReportError
from cfsp.quality.paired import Estimate, difference, mean, mean_of_tasks, per_count
from cfsp.quality.results_file import MeasuredModel, answer_measures, hashes

# A model whose accuracy is less than so many standard errors above a guess may be guessing.
_ERRORS_ABOVE_CHANCE = 2.0


@dataclass(frozen=True)
class Pair:
    """A measure of two models on the same windows or documents."""

    first: Estimate
    second: Estimate
    difference: Estimate  # the mean of the differences

    def to_json(self) -> dict[str, Any]:
        """Return all three."""
        return {name: estimate.to_json() for name, estimate in vars(self).items()}


@dataclass(frozen=True)
class TextPair:
    """Two models on one text; what needs a dense model is None without one."""

    text: str
    windows: int
    loss: Pair  # negative log-likelihood per token in nats
    divergence: Pair | None  # KL(dense || model) per token in nats
    agreed: Pair | None  # top-1 agreement: share of tokens whose most likely one is the dense one's


@dataclass(frozen=True)
class TaskPair:
    """Two models on one task, by one metric; what needs a dense model is None without one."""

    task: str
    metric: str  # `acc_norm` where the task has it, else `acc`
    documents: int
    accuracy: Pair
    kept: Pair | None  # share of answers that are the dense model's, where one of several is picked
    loss: Pair | None  # of a free continuation, in nats; None of other tasks
    dense: Estimate | None  # the dense model's accuracy
    chance: float  # the accuracy of a guess
    is_above_chance: bool | None  # whether the dense model is better than that


@dataclass(frozen=True)
class Comparison:
    """Two models compared; means are over the tasks on which the dense model beats a guess."""

    first: str
    second: str
    texts: list[TextPair]
    tasks: list[TaskPair]
    accuracy: Pair | None
    kept: Pair | None
    questions: int  # how many both were asked
    answers: dict[str, Pair]  # how theirs differ, by measure (see `answer_measures`)

    @property
    def left_out(self) -> list[TaskPair]:
        """The tasks on which the dense model is not better than a guess."""
        return [pair for pair in self.tasks if pair.is_above_chance is False]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types."""
        return {
            "first": self.first,
            "second": self.second,
            "texts": {pair.text: _fields(pair, "text") for pair in self.texts},
            "tasks": {pair.task: _fields(pair, "task") for pair in self.tasks},
            "left_out": [pair.task for pair in self.left_out],
            "accuracy": self.accuracy and self.accuracy.to_json(),
            "kept": self.kept and self.kept.to_json(),
            "questions": self.questions,
            "answers": {name: pair.to_json() for name, pair in self.answers.items()},
        }


def compare(first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None) -> Comparison:
    """Compare two models on the texts, tasks and questions that both were measured on.

    The dense model may be one of them. Other windows or documents are refused.
    """
    texts = [
        _text_pair(text, first, second, dense) for text in first.windows if text in second.windows
    ]
    tasks = [
        _task_pair(task, first, second, dense)
        for task in first.documents
        if task in second.documents
    ]
    answers = _answer_pairs(first, second) if first.answers and second.answers else {}
    if not (texts or tasks or answers):
        raise ReportError(
            f"{first.name} and {second.name} have no text and no task in common, and no answers; "
            "measure both with the same --data or --tasks, or --answers"
        )
    counted = [pair for pair in tasks if pair.is_above_chance is not False]
    return Comparison(
        first.name,
        second.name,
        texts,
        tasks,
        _mean([pair.accuracy for pair in counted]),
        _mean([pair.kept for pair in counted if pair.kept is not None]),
        len(first.answers["documents"]) if answers else 0,
        answers,
    )


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
    counts = one["predicted"]

    def pair(name: str) -> Pair | None:
        sums = [_sums(model, text, name, dense) for model in (first, second)]
        if sums[0] is None or sums[1] is None:
            return None
        return _pair_per_count(sums[0], sums[1], counts)

    loss = pair("loss")
    assert loss is not None
    return TextPair(text, len(counts), loss, pair("divergence"), pair("agreed"))


def _sums(
    model: MeasuredModel, text: str, name: str, dense: MeasuredModel | None
) -> list[float] | None:
    """Return the sums over windows of one measure; None if it was not measured.

    The dense model agrees with itself.
    """
    sums = model.windows[text]
    if name == "loss":
        return list(sums["loss"])
    if dense is None:
        return None
    if model is dense:
        return [0.0] * len(sums["predicted"]) if name == "divergence" else list(sums["predicted"])
    return list(sums[name]) if name in sums and model.against == dense.fingerprint else None


def _task_pair(
    task: str, first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None
) -> TaskPair:
    of_dense = None if dense is None else dense.documents.get(task)
    for model in (second, dense):
        if model is not None and task in model.documents:
            _check_same_documents(task, first, model)
    one, other = first.documents[task], second.documents[task]
    metric = "acc_norm" if all("acc_norm" in each for each in one) else "acc"
    if any(metric not in each for each in other):
        raise ReportError(
            f"{first.name} and {second.name} were scored on {task} by other metrics, perhaps by "
            "another version of the harness; score both alike"
        )
    kept = loss = accuracy_of_dense = is_above = None
    chance = mean([each["chance"] for each in one]).value
    if of_dense is not None:
        accuracy_of_dense = mean([each[metric] for each in of_dense])
        above = mean([each[metric] - each["chance"] for each in of_dense])
        is_above = above.value > _ERRORS_ABOVE_CHANCE * (above.stderr or 0.0)
        dense_answers = _answers(of_dense, metric)
        answers = [_answers(each, metric) for each in (one, other)]
        if None not in (*dense_answers, *answers[0], *answers[1]):
            kept = _pair(*(list(map(float, map(eq, each, dense_answers))) for each in answers))
    if all("gold" not in each and "loglikelihoods" in each for each in one):
        loss = _pair(*([-each["loglikelihoods"][0] for each in some] for some in (one, other)))
    return TaskPair(
        task,
        metric,
        len(one),
        _pair(*([each[metric] for each in some] for some in (one, other))),
        kept,
        loss,
        accuracy_of_dense,
        chance,
        is_above,
    )


def _answer_pairs(first: MeasuredModel, second: MeasuredModel) -> dict[str, Pair]:
    one, other = first.answers, second.answers
    if one["digest"] != other["digest"]:
        raise ReportError(
            f"{first.name} and {second.name} were measured on other answers: of another dense "
            "model, to other questions, or by another --dtype; measure both alike"
        )
    theirs = answer_measures(other)
    return {
        name: _pair_per_count(sums, theirs[name][0], counts)
        for name, (sums, counts) in answer_measures(one).items()
    }


def _check_same_documents(task: str, first: MeasuredModel, second: MeasuredModel) -> None:
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


def _answers(documents: Sequence[dict[str, Any]], metric: str) -> list[Any]:
    """Return what was answered to each; None where there is nothing that can be the same."""
    name = "choice_norm" if metric == "acc_norm" else "choice"
    return [each.get(name, each.get("answer")) for each in documents]


def _pair(first: Sequence[float], second: Sequence[float]) -> Pair:
    return _pair_per_count(first, second, [1] * len(first))


def _pair_per_count(first: Sequence[float], second: Sequence[float], counts: Sequence[int]) -> Pair:
    """Return the means over tokens of two models' sums, which are over as many in both."""
    apart = difference(first, second)
    return Pair(per_count(first, counts), per_count(second, counts), per_count(apart, counts))


def _mean(pairs: Sequence[Pair]) -> Pair | None:
    if not pairs:
        return None
    return Pair(
        mean_of_tasks([pair.first for pair in pairs]),
        mean_of_tasks([pair.second for pair in pairs]),
        mean_of_tasks([pair.difference for pair in pairs]),
    )


def _fields(pair: TextPair | TaskPair, without: str) -> dict[str, Any]:
    return {
        name: each.to_json() if isinstance(each, Pair | Estimate) else each
        for name, each in vars(pair).items()
        if name != without
    }

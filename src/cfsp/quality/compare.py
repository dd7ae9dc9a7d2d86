"""Two models compared window by window and document by document, beside the dense model.

Every difference is second - first. `cfsp.quality.paired` has the formulas.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from cfsp.errors import ReportError
from cfsp.quality.paired import Number, as_json, difference, mean, mean_of_tasks, per_count
from cfsp.quality.results_file import (
    MeasuredModel,
    Measures,
    answer_measures,
    documents_digest,
    hashes,
)
from cfsp.quality.tasks.harness import UNREAD, ScoredDocument, chance_of, losses_of

logger = logging.getLogger(__name__)

# A measure of two models on the same windows or documents: of the `first`, of the `second`, and the
# mean of the differences, `difference`.
Pair = dict[str, Number]

# A model whose accuracy is less than so many standard errors above a guess may be guessing.
_ERRORS_ABOVE_CHANCE = 2.0


def compare(
    first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None
) -> dict[str, Any]:
    """Compare two models on the texts, tasks and questions that both were measured on.

    The dense model may be one of them. Other windows or documents are refused.

    Returns:
        As JSON types: the names of the `first` and the `second`; `texts` and `tasks` by name, see
        below; `left_out`, the tasks on which the dense model is not better than a guess; of the
        others the mean `accuracy` and `kept`; how many `questions` both were asked, the
        `answers_digest` of the dense model's answers, and by measure how theirs differ, `answers`
        (see `answer_measures`). Each measure is a pair: `first`,
        `second` and their `difference`, each a `value` with its `stderr`; None where it is not
        known, as without the dense model what compares with it.

        Of a text how many `windows`, `loss` and `divergence` (KL from the dense model) per token in
        nats, `agreed` (top-1 agreement). Of a task its `metric` (`acc_norm` where it has it, else
        `acc`), how many `documents` and a `digest` of them, after how many `shots`, the accuracy of
        the `dense` model and of a guess (`chance`), whether the former `is_above_chance`,
        `accuracy`, `kept` (share of answers that are the dense model's), and of a free continuation
        `loss` in nats.
    """
    texts = {
        text: _of_texts(text, first, second, dense)
        for text in first.windows
        if text in second.windows
    }
    tasks = {
        task: _of_tasks(task, first, second, dense)
        for task, documents in first.documents.items()
        if documents and task in second.documents  # of some kinds of tasks none are known
    }
    answers = _of_answers(first, second, dense) if first.answers and second.answers else {}
    if not (texts or tasks or answers):
        raise ReportError(
            f"{first.name} and {second.name} have no text and no task in common, and no answers; "
            "measure both with the same --data or --tasks, or --answers"
        )
    left_out = [task for task, found in tasks.items() if found["is_above_chance"] is False]
    counted = [found for task, found in tasks.items() if task not in left_out]
    return as_json(
        {
            "first": first.name,
            "second": second.name,
            "texts": texts,
            "tasks": tasks,
            "left_out": left_out,
            **{name: _mean([each[name] for each in counted]) for name in ("accuracy", "kept")},
            "questions": len(first.answers["documents"]) if answers else 0,
            "answers_digest": first.answers["digest"] if answers else "",
            "answers": answers,
        }
    )


def agreement_of(dense: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return how far a model is from the dense one, by text and in sum."""
    by_text: dict[str, Any] = {}
    for text, sums in model["windows"].items():
        counts = sums["predicted"]
        rise = per_count(difference(dense["windows"][text]["loss"], sums["loss"]), counts)
        by_text[text] = {
            "perplexity_ratio": math.exp(min(rise.value, 700.0)),
            "loss_rise": rise,
            "divergence": per_count(sums["divergence"], counts),
            "agreed": per_count(sums["agreed"], counts),
        }
    found = {"against": dense["model"], "fingerprint": dense["fingerprint"], "texts": by_text}
    if by_text:
        ratios = {text: each["perplexity_ratio"] for text, each in by_text.items()}
        worst = max(ratios, key=lambda text: ratios[text])
        found |= {
            "perplexity_ratio": geometric_mean(list(ratios.values())),
            "worst": {"text": worst, "perplexity_ratio": ratios[worst]},
        }
    return as_json(found)


def comparisons(
    models: Sequence[MeasuredModel], dense: MeasuredModel | None, base: MeasuredModel | None
) -> list[dict[str, Any]]:
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
    dtypes = {each.dtype: each.name for pair in pairs for each in pair if each.dtype}
    if len(dtypes) > 1:
        which = " and ".join(f"{name} in {dtype}" for dtype, name in dtypes.items())
        logger.warning("computed were %s: the differences are of rounding too", which)
    return [compare(first, second, dense) for first, second in pairs]


def _of_texts(
    text: str, first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None
) -> dict[str, Any]:
    one, other = first.windows[text], second.windows[text]
    if one["digest"] != other["digest"]:
        raise ReportError(
            f"{first.name} and {second.name} were measured on other windows of {text}: another "
            "tokenizer, --windows, --seqlen or --bos; measure both alike"
        )
    pairs = _pairs(*(_of_text(model, text, dense) for model in (first, second)))
    none = dict.fromkeys(("loss", "divergence", "agreed"))
    return {"windows": len(one["predicted"]), **none, **pairs}


def _of_text(model: MeasuredModel, text: str, dense: MeasuredModel | None) -> Measures:
    """Return what was measured on a text; the dense model agrees with itself."""
    sums = model.windows[text]
    counts = sums["predicted"]
    found = {"loss": (sums["loss"], counts)}
    if dense is not None and model is dense:
        found |= {"divergence": ([0.0] * len(counts), counts), "agreed": (counts, counts)}
    elif dense is not None:
        compared = sums["compared"].get(dense.fingerprint, {})
        found |= {name: (each, counts) for name, each in compared.items()}
    return found


def _of_tasks(
    task: str, first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None
) -> dict[str, Any]:
    of_dense = None if dense is None else dense.documents.get(task)
    one, other = first.documents[task], second.documents[task]
    metric = "acc_norm" if all("acc_norm" in each for each in one) else "acc"
    for model in (second, dense):
        if model is not None and task in model.documents:
            _check_same_documents(task, metric, first, model)
    is_above = None
    if of_dense is not None and chance_of(of_dense) is not None:
        above = mean([each[metric] - each["chance"] for each in of_dense])
        is_above = above.value > _ERRORS_ABOVE_CHANCE * (above.stderr or 0.0)
    return {
        "metric": metric,
        "documents": len(one),
        "digest": documents_digest(one),
        "shots": first.tasks.get(task, {}).get("shots"),
        "dense": None if of_dense is None else mean([each[metric] for each in of_dense]),
        "chance": chance_of(one),
        "is_above_chance": is_above,
        **dict.fromkeys(("accuracy", "kept", "loss")),
        **_pairs(*(_of_task(each, metric, of_dense) for each in (one, other))),
    }


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
            # Two of which nothing could be read are not.
            pairs = zip(own, expected, strict=True)
            found["kept"] = [float(one == other != UNREAD) for one, other in pairs]
    if (losses := losses_of(documents)) is not None:
        found["loss"] = losses
    return {name: (values, [1] * len(documents)) for name, values in found.items()}


def _of_answers(
    first: MeasuredModel, second: MeasuredModel, dense: MeasuredModel | None
) -> dict[str, Pair | None]:
    one, other = first.answers, second.answers
    if one["digest"] != other["digest"]:
        raise ReportError(
            f"{first.name} and {second.name} were measured on other answers: of another dense "
            "model, to other questions, or by another --dtype; measure both alike"
        )
    pairs = _pairs(answer_measures(one), answer_measures(other))
    # What compares with answers of another model than the dense one says nothing.
    is_dense = dense is None or one["compared"] == dense.fingerprint
    return {**pairs, **({} if is_dense else dict.fromkeys(("divergence", "agreed", "alike")))}


def _pairs(first: Measures, second: Measures) -> dict[str, Pair]:
    """Return the means of what was measured of both models, and of their differences.

    Sums are over as many tokens in both.
    """
    return {
        name: {
            "first": per_count(sums, counts),
            "second": per_count(second[name][0], counts),
            "difference": per_count(difference(sums, second[name][0]), counts),
        }
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
    of_task = [chance_of(each) is None for each in (one, other)]
    if any(metric not in each for each in other) or of_task[0] != of_task[1]:
        raise ReportError(
            f"{first.name} and {second.name} were scored on {task} by other metrics, perhaps by "
            "another version of the harness; score both alike"
        )


def _mean(pairs: Sequence[Pair | None]) -> Pair | None:
    """Return the mean over tasks that have the measure; None without any."""
    known = [pair for pair in pairs if pair is not None]
    sides = ("first", "second", "difference")
    return (
        {side: mean_of_tasks([pair[side] for pair in known]) for side in sides} if known else None
    )

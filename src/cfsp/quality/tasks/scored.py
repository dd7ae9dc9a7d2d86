"""What a model made of each document of a task, so that models are compared in pairs.

There are three kinds of documents: choices to pick from, a text to continue (as LAMBADA's last
word), and an answer to write (as GSM8K's).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from cfsp.quality.paired import mean

# How the harness takes an answer from what was written; the first that a task has is taken.
FILTERS = ("none", "strict-match", "flexible-extract")


@dataclass(frozen=True)
class ScoredDocument:
    """One document; what does not apply to its kind is None.

    Attributes:
        id: number of the document in its task, after the task's name where a group has several.
        hash: of the document's content, so that only the same ones are compared.
        gold: number of the right choice, or of several.
        loglikelihoods: of each choice, or of the one continuation, in nats.
        choice: number of the likeliest choice.
        choice_norm: number of the likeliest choice by character.
        answer: what was written.
        acc: 1 if it is right (the likeliest choice, every token of the continuation, or the
            answer), else 0.
        acc_norm: 1 if the likeliest choice by character is right, else 0.
        chance: probability that a guess is right.
    """

    id: str
    hash: str
    acc: float
    chance: float
    gold: int | list[int] | None = None
    loglikelihoods: list[float] | None = None
    choice: int | None = None
    choice_norm: int | None = None
    answer: str | None = None
    acc_norm: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the fields that apply."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


def scored_documents(
    tasks: Sequence[tuple[Any, Sequence[dict[str, Any]]]],
) -> list[ScoredDocument]:
    """Return the documents of a task, or of all tasks of a group, in their order.

    Args:
        tasks: the harness's, each with what it logged: of each filter one sample of each document.
    """
    found: list[ScoredDocument] = []
    picked: list[list[str]] = []
    for task, logged in tasks:
        filters = {sample["filter"] for sample in logged}
        chosen = next((each for each in FILTERS if each in filters), None)
        for sample in logged:
            if sample["filter"] != chosen:
                continue
            if task.OUTPUT_TYPE == "multiple_choice":
                picked.append(task.doc_to_choice(sample["doc"]))
                found.append(_multiple_choice(task, sample, picked[-1]))
            elif task.OUTPUT_TYPE == "loglikelihood" and "acc" in sample:
                likelihoods = [_rounded(sample["filtered_resps"][0][0])]
                right = float(sample["acc"])
                found.append(
                    ScoredDocument(*_names(task, sample), right, 0.0, loglikelihoods=likelihoods)
                )
            elif "exact_match" in sample:
                answer, right = str(sample["filtered_resps"][0]), float(sample["exact_match"])
                found.append(ScoredDocument(*_names(task, sample), right, 0.0, answer=answer))
    if len(picked) > 1 and all(choices == picked[0] for choices in picked):
        return _with_best_guess(found)
    return found


def summary_of(documents: Sequence[ScoredDocument]) -> dict[str, Any]:
    """Return what the documents say beyond the harness's own numbers.

    Returns:
        `chance`, the accuracy of a guess; and of continuations `loss`, the mean negative
        log-likelihood in nats, with its standard error.
    """
    if not documents:
        return {}
    found: dict[str, Any] = {"chance": round(mean([each.chance for each in documents]).value, 6)}
    if all(each.gold is None and each.loglikelihoods for each in documents):
        loss = mean([-each.loglikelihoods[0] for each in documents if each.loglikelihoods])
        found |= {"loss": loss.value, "loss_stderr": loss.stderr}
    return found


def _names(task: Any, sample: dict[str, Any]) -> tuple[str, str]:
    return f"{task.config.task}/{sample['doc_id']}", sample["doc_hash"][:16]


def _multiple_choice(task: Any, sample: dict[str, Any], choices: list[str]) -> ScoredDocument:
    # Of documents with a context for each choice, the harness calls the right one the text.
    gold_of = task.doc_to_text if task.multiple_input else task.doc_to_target
    gold = _gold(gold_of(sample["doc"]), choices)
    golds = gold if isinstance(gold, list) else [gold]
    likelihoods = [float(each[0]) for each in sample["filtered_resps"]][: len(choices)]
    by_character = [
        each / max(1, len(choice)) for each, choice in zip(likelihoods, choices, strict=True)
    ]
    choice = likelihoods.index(max(likelihoods))
    return ScoredDocument(
        *_names(task, sample),
        float(choice in golds),
        len(golds) / len(choices),
        gold=gold,
        loglikelihoods=[_rounded(each) for each in likelihoods],
        choice=choice,
        choice_norm=by_character.index(max(by_character)),
        acc_norm=float(sample["acc_norm"]) if "acc_norm" in sample else None,
    )


def _gold(found: Any, choices: Sequence[str]) -> int | list[int]:
    if isinstance(found, list):
        return [int(each) for each in found]
    return choices.index(found) if isinstance(found, str) else int(found)


def _with_best_guess(documents: Sequence[ScoredDocument]) -> list[ScoredDocument]:
    """Return documents of the same choices, with the chance of the best constant guess.

    To say yes to everything is right in most documents of BoolQ.
    """
    _, times = Counter(str(each.gold) for each in documents).most_common(1)[0]
    return [replace(each, chance=times / len(documents)) for each in documents]


def _rounded(loglikelihood: float) -> float:
    return round(float(loglikelihood), 5)

"""What a model made of each document of a task, so that models are compared in pairs.

There are three kinds of documents: choices to pick from, a text to continue (as LAMBADA's last
word), and an answer to write (as GSM8K's). A scored document has of these fields what applies:

    id              number in its task, after the task's name where a group has several
    hash            of its content, so that only the same ones are compared
    acc             1 if it is right (the likeliest choice, every token of the continuation, or the
                    answer), else 0
    chance          probability that a guess is right
    gold            number of the right choice, or of several
    loglikelihoods  of each choice, or of the one continuation, in nats
    choice          number of the likeliest choice
    choice_norm     number of the likeliest choice by character
    answer          what was written
    acc_norm        1 if the likeliest choice by character is right, else 0
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cfsp.quality.paired import mean

# How the harness takes an answer from what was written; the first that a task has is taken.
FILTERS = ("none", "strict-match", "flexible-extract")

ScoredDocument = dict[str, Any]


def scored_documents(
    tasks: Sequence[tuple[Any, Sequence[dict[str, Any]]]],
) -> list[ScoredDocument]:
    """Return the documents of a task, or of all tasks of a group, in their order.

    Each of the harness's tasks comes with what it logged: of each filter a sample of each document.
    """
    found: list[ScoredDocument] = []
    picked: list[list[str]] = []
    for task, logged in tasks:
        filters = {sample["filter"] for sample in logged}
        chosen = next((each for each in FILTERS if each in filters), None)
        for sample in logged:
            if sample["filter"] != chosen:
                continue
            document = {
                "id": f"{task.config.task}/{sample['doc_id']}",
                "hash": sample["doc_hash"][:16],
            }
            if task.OUTPUT_TYPE == "multiple_choice":
                picked.append(task.doc_to_choice(sample["doc"]))
                found.append(document | _multiple_choice(task, sample, picked[-1]))
            elif task.OUTPUT_TYPE == "loglikelihood" and "acc" in sample:
                likelihoods = [_rounded(sample["filtered_resps"][0][0])]
                right = {"acc": float(sample["acc"]), "chance": 0.0}
                found.append(document | right | {"loglikelihoods": likelihoods})
            elif "exact_match" in sample:
                right = {"acc": float(sample["exact_match"]), "chance": 0.0}
                found.append(document | right | {"answer": str(sample["filtered_resps"][0])})
    if len(picked) > 1 and all(choices == picked[0] for choices in picked):
        # To say yes to everything is right in most documents of BoolQ: the best constant guess.
        _, times = Counter(str(each.get("gold")) for each in found).most_common(1)[0]
        return [{**each, "chance": times / len(found)} for each in found]
    return found


def summary_of(documents: Sequence[ScoredDocument]) -> dict[str, Any]:
    """Return what the documents say beyond the harness's own numbers.

    That is `chance`, the accuracy of a guess; and of continuations `loss`, the mean negative
    log-likelihood in nats, with its standard error.
    """
    if not documents:
        return {}
    found: dict[str, Any] = {"chance": round(mean([each["chance"] for each in documents]).value, 6)}
    if all("gold" not in each and "loglikelihoods" in each for each in documents):
        loss = mean([-each["loglikelihoods"][0] for each in documents])
        found |= {"loss": loss.value, "loss_stderr": loss.stderr}
    return found


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
    found = {
        "acc": float(choice in golds),
        "chance": len(golds) / len(choices),
        "gold": gold,
        "loglikelihoods": [_rounded(each) for each in likelihoods],
        "choice": choice,
        "choice_norm": by_character.index(max(by_character)),
    }
    return found | ({"acc_norm": float(sample["acc_norm"])} if "acc_norm" in sample else {})


def _gold(found: Any, choices: Sequence[str]) -> int | list[int]:
    if isinstance(found, list):
        return [int(each) for each in found]
    return choices.index(found) if isinstance(found, str) else int(found)


def _rounded(loglikelihood: float) -> float:
    return round(float(loglikelihood), 5)

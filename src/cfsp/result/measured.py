"""Facts from measurements: of `cfsp eval --json`, of `cfsp bench --json`, or in a manifest.

Each model measured is one side of a run: `before`, the original, or `after`, the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cfsp.quality.compare import compare
from cfsp.quality.results_file import measured_model
from cfsp.result.conditions import Conditions
from cfsp.result.facts import NATS, PERCENT, PERPLEXITY, QUALITY, RATE, SPEED, Fact, Number, Unit

ANSWERS, AGREEMENT, TASKS = "Answers", "Agreement with the original", "Tasks"
PAIRS = "Tasks in pairs with the original"

_OF_ANSWERS = {
    "divergence": ("KL per token on the original's answers, nats", NATS),
    "agreed": ("top-1 agreement on the original's answers, percent", PERCENT),
    "stops": ("answers that end, percent", PERCENT),
    "loops": ("answers that repeat 4 tokens 4 times, percent", PERCENT),
    "alike": ("first tokens as the original's", Unit("{:.1f}".format)),
}

Side = Callable[[str], str | None]
Models = Sequence[Mapping[str, Any]]
# A question with its kind and an answer, as `cfsp.quality.answers` has it.
Document = Mapping[str, Any]


def result_facts(models: Models, side_of: Side) -> list[Fact]:
    """Return what eval or bench measured of a run and of its original, as the command prints it.

    Args:
        models: entries of the object that the command prints.
        side_of: gives the side that a model is, by its name; None of other models.

    Raises:
        KeyError, TypeError, ValueError, IndexError, AttributeError: they are something else.
    """
    if "workloads" in models[0]:
        return speed_facts(models, side_of)
    facts = []
    sides = {side_of(str(model["model"])): model for model in models}
    for side, model in sides.items():
        if side is None:
            continue
        for text, entry in model["perplexity"].items():
            number, how = Number(float(entry["value"])), Conditions.of(text, entry)
            facts.append(_on(side, number, QUALITY, "perplexity", PERPLEXITY, text, how))
        for task, scores in model.get("tasks", {}).items():
            for metric in ("acc", "acc_norm"):
                if metric in scores:
                    error = scores.get(f"{metric}_stderr")
                    number = _number({"value": scores[metric], "stderr": error})
                    facts.append(_on(side, number, TASKS, f"{task}, {metric}", PERCENT))
    before, after = (sides.get(side, {}) for side in ("before", "after"))
    if "windows" in before and "windows" in after:
        dense, pruned = (measured_model("the results", dict(each)) for each in (before, after))
        facts += comparison_facts(compare(dense, pruned, dense).to_json())
    return facts


def answer_documents(models: Models, side_of: Side) -> list[tuple[Document, Document]]:
    """Return what the original and a run answered to each question; nothing where none was asked.

    Raises:
        KeyError, TypeError: the models are not as eval writes them.
    """
    sides = {side_of(str(model["model"])): model.get("answers") for model in models}
    both = [answers for side in ("before", "after") if (answers := sides.get(side))]
    if len(both) < 2:
        return []
    keys = ("kind", "question", "answer", "stops", "loops")
    pairs = (
        [{key: each[key] for key in keys} for each in answers["documents"]] for answers in both
    )
    return list(zip(*pairs, strict=True))


def speed_facts(models: Models, side_of: Side) -> list[Fact]:
    """Return tokens per second by phase and workload, with the ratio to the original.

    Ratios are to the first model; they mean something here only if that is the original.
    """
    facts = []
    compared = side_of(str(models[0]["model"])) == "before"
    for model in models:
        side = side_of(str(model["model"]))
        for workload in model["workloads"] if side else ():
            shape = f"batch {workload['batch']}, prompt {workload['prompt']}"
            for phase in ("prefill", "decode"):
                figures = workload[phase]
                has_ratio = side == "after" and compared and not figures.get("too_busy")
                ratio = float(figures["ratio"]) if has_ratio else None
                rate = Number(float(figures["tokens_per_second"]))
                fact = _on(str(side), rate, SPEED, f"{phase}, {shape}", RATE)
                facts.append(replace(fact, ratio=ratio))
    return facts


def comparison_facts(comparison: Mapping[str, Any] | None) -> list[Fact]:
    """Return what pairs with the original say, from `Comparison.to_json`; nothing from None."""
    if not comparison:
        return []
    facts = []
    for key, pair in comparison.get("answers", {}).items():
        name, unit = _OF_ANSWERS[key]
        before = _number(pair["first"]) if key in ("stops", "loops") else None
        detail = f"{comparison['questions']} questions" if key == "divergence" else ""
        after = _number(pair["second"])
        facts.append(Fact(ANSWERS, name, unit, before, after, detail=detail))
    for text, pairs in comparison.get("texts", {}).items():
        for key, name, unit in (
            ("divergence", "KL per token, nats", NATS),
            ("agreed", "top-1 agreement, percent", PERCENT),
        ):
            if pair := pairs.get(key):
                number = _number(pair["second"])
                facts.append(_on("after", number, AGREEMENT, name, unit, text))
    for task, pairs in [*comparison.get("tasks", {}).items(), ("mean of tasks", comparison)]:
        is_guess = pairs.get("is_above_chance") is False
        guess = "the original does not beat a guess; not in the mean" if is_guess else ""
        for key, of, name, unit, detail in (
            ("accuracy", "difference", "accuracy - original's, percent", PERCENT, guess),
            ("kept", "second", "answers as the original's, percent", PERCENT, ""),
            ("loss", "difference", "loss - original's, nats", NATS, ""),
        ):
            if pair := pairs.get(key):
                number = _number(pair[of])
                facts.append(Fact(PAIRS, f"{task}, {name}", unit, after=number, detail=detail))
    return facts


def _number(estimate: Mapping[str, Any]) -> Number:
    error = estimate.get("stderr")
    return Number(float(estimate["value"]), None if error is None else float(error))


def _on(
    side: str,
    number: Number,
    heading: str,
    name: str,
    unit: Unit,
    text: str = "",
    conditions: Conditions | None = None,
) -> Fact:
    """Return a fact of one side."""
    before, after = (number, None) if side == "before" else (None, number)
    return Fact(heading, name, unit, before, after, text, conditions)

"""What the page says about a run: its facts, read from its directory without a model, and results.

A run is a directory that cfsp wrote. Its manifest must be there; the plan may be missing, and
the page then leaves out what it would have shown. The directory of a sweep stands for its runs.
Results are those of `cfsp eval --json` and `cfsp bench --json`, in files or in a manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE, SWEEP_FILE
from cfsp.errors import CheckpointError, ReportError
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality.compare import compare
from cfsp.quality.paired import Number
from cfsp.quality.results_file import documents_digest, measured_model
from cfsp.result.facts import (
    COUNT,
    NATS,
    NOTHING,
    PARAMETERS,
    PERCENT,
    QUALITY,
    SIZE,
    SPEED,
    Conditions,
    Fact,
    Sides,
    Unit,
    joined,
    labels,
    perplexity_fact,
    perplexity_facts,
    size_facts,
    speed_facts,
)
from cfsp.result.manifest import digest_of_plan, plan_beside, read_manifest, refusing_damage
from cfsp.result.names import short_names

logger = logging.getLogger(__name__)

ANSWERS, AGREEMENT, TASKS = "Answers", "Agreement with the original", "Tasks"
PAIRS = "Tasks in pairs with the original"
HEADINGS = (SIZE, ANSWERS, QUALITY, AGREEMENT, TASKS, PAIRS, SPEED)  # of tables, in their order
_OF_ANSWERS = {
    "divergence": ("KL per token on the original's answers, nats", NATS),
    "agreed": ("top-1 agreement on the original's answers, percent", PERCENT),
    "stops": ("answers that end, percent", PERCENT),
    "loops": ("answers that repeat 4 tokens 4 times, percent", PERCENT),
    "alike": ("first tokens as the original's", Unit("{:.1f}".format)),
}
_OF_TEXTS = {
    "divergence": ("KL per token, nats", NATS),
    "agreed": ("top-1 agreement, percent", PERCENT),
}
_SCORES = {"acc": PERCENT, "acc_norm": PERCENT, "exact_match": PERCENT, "loss": NATS}
# Of a task, what of a pair it is, and how it is called.
_OF_TASKS = {
    "accuracy": ("difference", "{metric} - original's, percent", PERCENT),
    "kept": ("second", "answers as the original's, percent", PERCENT),
    "loss": ("difference", "loss - original's, nats", NATS),
}

# A question with its kind and an answer, as `cfsp.quality.answers` has it.
Document = Mapping[str, Any]

# Of the models that the demonstration times.
_SIDES = {"dense": "before", "pruned": "after"}


@dataclass(frozen=True)
class RunFacts:
    """One run."""

    name: str  # differs between the runs of one page
    directory: Path
    manifest: dict[str, Any]
    facts: Sequence[Fact] = ()  # of it and the original; one for each key
    plan: PruningPlan | None = None  # if the file is there
    # What the original and it answered to each question.
    answers: Sequence[tuple[Document, Document]] = ()

    def under(self, heading: str) -> list[Fact]:
        """Return the facts of one table."""
        return [fact for fact in self.facts if fact.heading == heading]

    def sides_in(self, models: Sequence[Mapping[str, Any]]) -> Sides:
        """Return what results have of this run and of its original, which are known by weights."""
        prints = {"before": self._base.get("fingerprint"), "after": self._fingerprint}
        return {
            side: model
            for model in models
            for side, own in prints.items()
            if own is not None and model.get("fingerprint") == own
        }

    @cached_property
    def _fingerprint(self) -> str | None:
        """Of its weights; None where they were not kept, as of the runs of a sweep."""
        try:
            return open_checkpoint(self.directory).fingerprint
        except CheckpointError:
            return None

    @property
    def _base(self) -> Mapping[str, Any]:
        """What is known of the model that was pruned."""
        found: Mapping[str, Any] = self.manifest.get("base_model", {})
        return found

    @property
    def base_name(self) -> str:
        """How the user called the model that was pruned."""
        return str(self._base.get("name", "the original"))

    @property
    def recovery_history(self) -> list[dict[str, float]]:
        """Step, held-out loss and, where there is one, loss; empty without recovery."""
        history: list[dict[str, float]] = (self.manifest.get("recovery") or {}).get("history", [])
        return history


def read_run(directory: Path) -> RunFacts:
    """Read the facts about one run."""
    manifest = read_manifest(directory)
    if not directory.exists():
        raise ReportError(f"{directory} does not exist; give what cfsp prune or cfsp eval wrote")
    if manifest is None:
        raise ReportError(
            f"{directory} has no {MANIFEST_FILE}; a report needs a directory that cfsp prune, "
            "cfsp recover or cfsp sweep wrote"
        )
    plan = plan_beside(directory)
    if plan is not None and manifest.get("plan_digest") != digest_of_plan(plan):
        raise ReportError(
            f"{directory}: {PLAN_FILE} is not the plan that {MANIFEST_FILE} tells of; they are of "
            "different runs"
        )
    weights = sum(file.stat().st_size for file in directory.glob("model*.safetensors"))
    with refusing_damage(directory):
        speed = manifest["speed"]["models"] if manifest.get("speed") else []
        facts = [
            *size_facts(manifest, weights),
            *perplexity_facts(manifest),
            *_comparison_facts(manifest.get("comparison") or {}, manifest.get("perplexity") or {}),
            # Where the demonstration has put it.
            *(speed_facts(speed[0], {_SIDES[m["model"]]: m for m in speed}) if speed else []),
        ]
        return RunFacts(directory.resolve().name, directory, manifest, joined(facts), plan)


def read_runs(directories: Sequence[Path]) -> list[RunFacts]:
    """Read several runs and give each a name of its own; a sweep stands for its runs."""
    found = [each for directory in directories for each in _runs_in(directory)]
    runs = [read_run(each) for each in {path.resolve(): path for path in found}.values()]
    names = short_names((str(run.directory.resolve()) for run in runs), least=1)
    return [replace(run, name=names[str(run.directory.resolve())]) for run in runs]


def _runs_in(directory: Path) -> list[Path]:
    """Return the finished runs of a sweep's directory; another directory is a run itself."""
    if (directory / MANIFEST_FILE).is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST_FILE}"))
    runs = [run for run in found if not run.name.startswith(".")]
    if not runs and (directory / SWEEP_FILE).is_file():
        raise ReportError(
            f"the sweep in {directory} has no finished model yet; its command goes on with it"
        )
    return runs or [directory]


def side_by_side(runs: Sequence[RunFacts], heading: str) -> list[dict[str, Fact]]:
    """Return what compares under a heading, text by text: one fact of each run, by its name."""
    found: dict[object, dict[str, Fact]] = {}
    for run in runs:
        for fact in run.under(heading):
            found.setdefault(fact.key, {})[run.name] = fact
    texts = list(dict.fromkeys(fact.text for run in runs for fact in run.facts))
    return sorted(found.values(), key=lambda facts: texts.index(any_of(facts).text))


def any_of(facts: Mapping[str, Fact]) -> Fact:
    """Return one of facts that compare."""
    return next(iter(facts.values()))


class Cell(NamedTuple):
    """A number and a remark about it."""

    value: str
    note: str = ""


class Row(NamedTuple):
    """A number of the original and of each run."""

    name: str
    cells: Sequence[Cell]  # the original first
    detail: str = ""  # the conditions, in small letters
    hint: str = ""  # more of them


def sections(runs: Sequence[RunFacts]) -> dict[str, list[Row]]:
    """Return the rows of runs of one model, under headings; headings without rows are left out."""
    names = labels(fact for run in runs for fact in run.facts)
    found = {
        heading: [_row(facts, runs, names[any_of(facts)]) for facts in side_by_side(runs, heading)]
        for heading in HEADINGS
    }
    return {heading: rows for heading, rows in found.items() if rows}


def _row(facts: dict[str, Fact], runs: Sequence[RunFacts], name: str) -> Row:
    """Return the row of one fact of several runs; the original is known from any of them."""
    first = any_of(facts)
    before = next((fact.before for fact in facts.values() if fact.before is not None), None)
    cells = [Cell(first.unit(before), first.note(before))]
    for run in runs:
        fact = facts.get(run.name)
        if fact is not None and fact.after is not None:
            fact = replace(fact, before=before)
            cells.append(Cell(fact.unit(fact.after), fact.change or fact.note(fact.after)))
        elif first.unit is COUNT and run.under(SIZE):
            cells.append(Cell(first.unit(before)))  # a part of which nothing could go
        else:
            cells.append(Cell(NOTHING))
    details = {fact.detail for fact in facts.values()}
    detail = details.pop() if len(details) == 1 else ""
    if first.conditions is None:
        return Row(name, cells, detail)
    how = first.conditions.beside({run.name: run.manifest for run in runs})
    return Row(name, cells, how, counted(first.conditions.tokens, "predicted tokens"))


def with_results(runs: Sequence[RunFacts], results: dict[str, Any]) -> list[RunFacts]:
    """Add what `cfsp eval --json` or `cfsp bench --json` measured to the runs it measured.

    A model of the results is one of the runs, or a run's original, if it has its weights.
    """
    models = results["models"]
    facts_of = partial(speed_facts, models[0]) if "workloads" in models[0] else _quality_facts
    sides = [run.sides_in(models) for run in runs]
    extended = [
        replace(
            run,
            facts=joined([*run.facts, *facts_of(both)]),
            answers=_answer_documents(both) or run.answers,
        )
        for run, both in zip(runs, sides, strict=True)
    ]
    told = [model for both in sides for model in both.values()]
    others = [str(model["model"]) for model in models if model not in told]
    if others and not any("after" in both for both in sides):
        raise ReportError(
            "the results are of none of the runs, by their weights; they are of: "
            f"{', '.join(str(model['model']) for model in models)}; measure again what has changed "
            "since"
        )
    if others:
        logger.warning(
            "left out of the results: %s, whose weights no run here has and none was made from; "
            "measure again what has changed since",
            ", ".join(others),
        )
    return extended


def measured_runs(models: Sequence[Mapping[str, Any]], *, compares: bool) -> list[RunFacts]:
    """Return what eval measured of models as facts of runs, of the first as their original's."""
    names, runs = short_names(str(model["model"]) for model in models), []
    for model in models[compares:]:
        both = {**({"before": models[0]} if compares else {}), "after": model}
        parameters = Fact(SIZE, PARAMETERS, COUNT)
        facts = [parameters.of(side, Number(m["parameters"])) for side, m in both.items()]
        facts += _quality_facts(both)
        own = str(model["model"])
        runs.append(RunFacts(names[own], Path(own), {}, joined(facts, finite=False)))
    return runs


def _quality_facts(both: Sides) -> list[Fact]:
    """Return what eval measured of a run and of its original, as the command prints it."""
    facts = []
    for side, model in both.items():
        for text, entry in model["perplexity"].items():
            fact = perplexity_fact(Conditions.of(text, entry))
            facts.append(fact.of(side, Number(float(entry["value"]))))
        for task, scores in model.get("tasks", {}).items():
            for metric, unit in _SCORES.items():
                if metric in scores:
                    error = scores.get(f"{metric}_stderr")
                    number = _number({"value": scores[metric], "stderr": error})
                    detail = _examined(scores)
                    name = f"{task}, {metric}{', nats' if unit is NATS else ''}"
                    digest = documents_digest(model.get("documents", {}).get(task, ()))
                    fact = Fact(TASKS, name, unit, detail=detail, digest=digest)
                    facts.append(fact.of(side, number))
    before, after = (both.get(side, {}) for side in ("before", "after"))
    if "windows" in before and "windows" in after:
        dense, pruned = (measured_model("the results", dict(each)) for each in (before, after))
        facts += _comparison_facts(compare(dense, pruned, dense), after["perplexity"])
    return facts


def _answer_documents(both: Sides) -> list[tuple[Document, Document]]:
    """Return what the original and a run answered to each question; nothing if none was asked."""
    each_side = (both.get(side, {}) for side in ("before", "after"))
    asked = [answers for model in each_side if (answers := model.get("answers"))]
    if len(asked) < 2:
        return []
    keys = ("kind", "question", "answer", "stops", "loops")
    pairs = (
        [{key: each[key] for key in keys} for each in answers["documents"]] for answers in asked
    )
    return list(zip(*pairs, strict=True))


def _comparison_facts(comparison: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Fact]:
    """Return what pairs say; perplexities of the same texts have `measured` the conditions."""
    facts, tasks = [], comparison.get("tasks", {})
    for key, (name, unit) in _OF_ANSWERS.items():
        if pair := comparison.get("answers", {}).get(key):
            before = _number(pair["first"]) if key in ("stops", "loops") else None
            detail = counted(comparison["questions"], "questions")
            on = {"detail": detail, "digest": comparison.get("answers_digest", "")}
            facts.append(Fact(ANSWERS, name, unit, before, _number(pair["second"]), **on))
    for text, pairs in comparison.get("texts", {}).items():
        how = Conditions.of(text, measured[text])
        for key, (name, unit) in _OF_TEXTS.items():
            if pair := pairs.get(key):
                facts.append(Fact(AGREEMENT, name, unit, None, _number(pair["second"]), text, how))
    left_out = comparison.get("left_out", ())
    counts = {task: pairs for task, pairs in tasks.items() if task not in left_out}
    for task, pairs in [*tasks.items(), ("mean of tasks", comparison)]:
        guess = "; the original does not beat a guess; not in the mean" if task in left_out else ""
        for key, (of, name, unit) in _OF_TASKS.items():
            if pair := pairs.get(key):
                # Where nothing is picked, as by LAMBADA, nothing can be the original's.
                on = {each: _examined(its) for each, its in counts.items() if its.get(key)}
                mean_of = f"{', '.join(on)}: {', '.join(dict.fromkeys(on.values()))}"
                detail = mean_of if pairs is comparison else _examined(pairs)
                detail += guess if key == "accuracy" else ""
                called = f"{task}, {name.format(metric=pairs.get('metric', 'accuracy'))}"
                counted_in = counts.values() if pairs is comparison else [pairs]
                digest = ",".join(its.get("digest", "") for its in counted_in)
                number = _number(pair[of])
                facts.append(Fact(PAIRS, called, unit, None, number, detail=detail, digest=digest))
    return facts


def _examined(task: Mapping[str, Any]) -> str:
    """Return on how much of a task a model was scored, and after how many solved examples."""
    shots = f", {counted(task['shots'], 'shots')}" if task.get("shots") else ""
    return counted(task["documents"], "documents") + shots


def _number(estimate: Mapping[str, Any]) -> Number:
    error = estimate.get("stderr")
    return Number(float(estimate["value"]), None if error is None else float(error))

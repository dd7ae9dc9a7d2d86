"""All that the page says about one run, read from its directory: no model is loaded.

A run is a directory that cfsp wrote. Its manifest must be there; the plan may be missing, and
the page then leaves out what it would have shown. The directory of a sweep stands
for its runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from typing import Any

from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE, SWEEP_FILE
from cfsp.errors import ReportError
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.conditions import Conditions
from cfsp.result.facts import QUALITY, Fact, joined, perplexity_facts, size_facts
from cfsp.result.making import Step, repair_steps
from cfsp.result.manifest import digest_of_plan, read_manifest, refusing_damage
from cfsp.result.measured import (
    Document,
    answer_documents,
    comparison_facts,
    result_facts,
    speed_facts,
)
from cfsp.result.names import short_names

# Of the models that the demonstration and sweeps time.
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

    def perplexity(self, conditions: Conditions) -> float | None:
        """Return its perplexity under some conditions; None if it was not measured."""
        found = (fact.after for fact in self.under(QUALITY) if fact.conditions == conditions)
        return next((number.value for number in found if number is not None), None)

    def side_of(self, model: str) -> str | None:
        """Return which side of this run a model is, by its name: before, after, or None."""
        if Path(model).resolve() == self.directory.resolve():
            return "after"
        return "before" if model == self.base_name else None

    @property
    def base_name(self) -> str:
        """How the user called the model that was pruned."""
        return str(self.manifest.get("base_model", {}).get("name", "the original"))

    @property
    def base_fingerprint(self) -> str:
        """Digest of the model that was pruned; the name where there is none."""
        return str(self.manifest.get("base_model", {}).get("fingerprint", self.base_name))

    @property
    def has_weights(self) -> bool:
        """Whether its weights were kept: a sweep keeps none."""
        return any(self.directory.glob("model*.safetensors"))

    @property
    def repair_steps(self) -> list[Step]:
        """The steps of repair; empty without repair."""
        return repair_steps(self.manifest)

    @property
    def recovery_history(self) -> list[dict[str, float]]:
        """Step, held-out loss and, where there is one, loss; empty without recovery."""
        history: list[dict[str, float]] = (self.manifest.get("recovery") or {}).get("history", [])
        # Earlier manifests have the perplexity of held-out text.
        return [
            {"held_out": log(entry["perplexity"]), **entry} if "perplexity" in entry else entry
            for entry in history
        ]


def read_run(directory: Path) -> RunFacts:
    """Read the facts about one run.

    Raises:
        ReportError: cfsp did not write the directory, or its files are of different runs.
        CfspError: a file in it is damaged.
    """
    if not directory.is_dir():
        raise ReportError(
            f"{directory} is not a directory; expected one that cfsp prune, recover or sweep wrote"
        )
    manifest = read_manifest(directory)
    if manifest is None:
        raise ReportError(
            f"{directory} has no {MANIFEST_FILE}; a report needs a directory that cfsp prune, "
            "cfsp recover or cfsp sweep wrote"
        )
    path = directory / PLAN_FILE
    plan = PruningPlan.load(path) if path.is_file() else None
    if plan is not None and manifest.get("plan_digest") != digest_of_plan(plan):
        raise ReportError(
            f"{directory}: {PLAN_FILE} is not the plan that {MANIFEST_FILE} tells of; they are of "
            "different runs"
        )
    weights = sum(file.stat().st_size for file in directory.glob("model*.safetensors"))
    speed = manifest.get("speed")
    with refusing_damage(directory):
        facts = [
            *size_facts(manifest, weights),
            *perplexity_facts(manifest),
            *comparison_facts(manifest.get("comparison")),
            # Where the demonstration or a sweep has put it.
            *(speed_facts(speed["models"], _SIDES.get) if speed else []),
        ]
        return RunFacts(directory.resolve().name, directory, manifest, joined(facts), plan)


def read_runs(directories: Sequence[Path]) -> list[RunFacts]:
    """Read several runs and give each a name of its own; a sweep stands for its runs."""
    runs = [read_run(each) for directory in directories for each in _runs_in(directory)]
    names = short_names((str(run.directory.resolve()) for run in runs), least=1)
    return [replace(run, name=names[str(run.directory.resolve())]) for run in runs]


def with_results(runs: Sequence[RunFacts], results: dict[str, Any]) -> list[RunFacts]:
    """Add what `cfsp eval --json` or `cfsp bench --json` measured to the runs it measured.

    A model of the results is one of the runs if it is the same directory, and a run's original if
    it has the name that was pruned.

    Raises:
        ReportError: they are something else, or measure none of the runs.
    """
    try:
        names = [str(model["model"]) for model in results["models"]]
        models = results["models"]
        extended = [
            replace(
                run,
                facts=joined([*run.facts, *result_facts(models, run.side_of)]),
                answers=answer_documents(models, run.side_of) or run.answers,
            )
            for run in runs
        ]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ReportError(
            "the results are not what `cfsp eval --json` or `cfsp bench --json` prints: "
            f"{error!r} is missing or of another type"
        ) from error
    if not any(run.side_of(name) == "after" for run in runs for name in names):
        raise ReportError(f"the results are of none of the runs; they are of: {', '.join(names)}")
    return extended


def measured_conditions(runs: Sequence[RunFacts]) -> list[Conditions]:
    """Return all conditions of perplexities, those of one text one after the other."""
    facts = [fact for run in runs for fact in run.under(QUALITY)]
    found = dict.fromkeys(fact.conditions for fact in facts if fact.conditions is not None)
    texts = list(dict.fromkeys(each.text for each in found))
    return sorted(found, key=lambda each: texts.index(each.text))


def perplexity_of_original(runs: Sequence[RunFacts], conditions: Conditions) -> float | None:
    """Return the original's perplexity under the same conditions; None if it was not measured."""
    facts = [fact for run in runs for fact in run.under(QUALITY) if fact.conditions == conditions]
    return next((fact.before.value for fact in facts if fact.before is not None), None)


def _runs_in(directory: Path) -> list[Path]:
    """Return the finished runs of a sweep's directory; another directory is a run itself."""
    if not (directory / SWEEP_FILE).is_file() or (directory / MANIFEST_FILE).is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST_FILE}"))
    runs = [run for run in found if not run.name.startswith(".")]
    if not runs:
        raise ReportError(
            f"the sweep in {directory} has no finished model yet; its command goes on with it"
        )
    return runs

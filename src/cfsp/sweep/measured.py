"""What was measured of the models of a sweep, and under which conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import OutputError
from cfsp.quality.compare import compare
from cfsp.quality.evaluate import evaluate_models
from cfsp.quality.results_file import measured_model
from cfsp.result.manifest import read_manifest
from cfsp.settings import Compute, EvaluationText
from cfsp.sweep.recipe import Point, Recipe

if TYPE_CHECKING:
    from cfsp.quality.tasks.harness import TaskRunner

# By text: {"value", "tokens", "windows", "seqlen", "stride", "bos"}, as `cfsp eval --json` has it.
Perplexities = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One model of a finished sweep; the first of a table is the dense one.

    Attributes:
        name: what it is called.
        method: name of how it was pruned; None for the dense model.
        sparsity: fraction that was asked for.
        seed: of its calibration; None for the dense model.
        parameters: of the model.
        perplexity: by text, with its conditions.
        speed: phase -> ratio to the dense model; empty if it was not timed.
        directory: what `cfsp report` reads; None for the dense model.
        comparison: with the dense model, window by window and document by document (see
            `cfsp.quality.compare.Comparison.to_json`); None if nothing was compared.
    """

    name: str
    method: str | None
    sparsity: float
    seed: int | None
    parameters: int
    perplexity: Perplexities
    speed: dict[str, float]
    directory: str | None
    comparison: dict[str, Any] | None = None

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}


def measure_dense(
    source: Checkpoint, recipe: Recipe, compute: Compute, tasks: TaskRunner | None
) -> dict[str, Any]:
    """Return what `cfsp eval --json` says of the dense model."""
    return evaluate_models([source.directory], recipe.evaluation, compute, tasks)[0]


def measure_pruned(
    model: Path,
    source: Checkpoint,
    dense: dict[str, Any],
    recipe: Recipe,
    compute: Compute,
    tasks: TaskRunner | None,
) -> dict[str, Any]:
    """Measure a pruned model, and compare it with the dense one as the recipe asks.

    Args:
        model: its directory.
        source: the dense model.
        dense: what `measure_dense` returned.
        recipe: what to measure.
        compute: how.
        tasks: what to score; None for no tasks.

    Returns:
        `perplexity` as the manifest has it, and `comparison` if there is one.
    """
    against = source.directory if recipe.agreement else None
    found = evaluate_models([model], recipe.evaluation, compute, against=against)[-1]
    if tasks is not None:
        found |= _only_tasks(evaluate_models([model], EvaluationText(()), compute, tasks)[0])
    before = dense["perplexity"]
    facts: dict[str, Any] = {
        "perplexity": {
            text: compared(before[text]["value"], after)
            for text, after in found["perplexity"].items()
        }
    }
    if recipe.agreement or tasks is not None:
        first, second = measured_model("dense", dense), measured_model("pruned", found)
        facts["comparison"] = compare(first, second, first).to_json()
    return facts


def _only_tasks(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("tasks", "documents")}


def compared(before: float, after: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the manifest's `perplexity`."""
    conditions = {name: value for name, value in after.items() if name != "value"}
    return {"before": before, "after": after["value"], **conditions}


def measure_speed(dense: Path, pruned: Path) -> dict[str, Any]:
    """Time both in turns: what disturbs the machine disturbs both."""
    from cfsp.speed import Conditions, Workload, compare_speed
    from cfsp.speed.subjects import Subject

    subjects = [Subject(dense, "dense"), Subject(pruned, "pruned")]
    return compare_speed(subjects, [Workload(prompt=128)], Conditions(rounds=5)).to_json()


def read_row(point: Point, directory: Path) -> Row:
    """Read what the manifest of a model says.

    Raises:
        OutputError: it is none of a sweep.
    """
    manifest = read_manifest(directory)
    if manifest is None or "sweep" not in manifest:
        raise OutputError(f"{directory} is no model of a sweep; delete it and run the sweep again")
    speed: dict[str, float] = {}
    if "speed" in manifest:
        workload = manifest["speed"]["models"][1]["workloads"][0]
        speed = {phase: workload[phase]["ratio"] for phase in ("prefill", "decode")}
    perplexity = {
        text: {"value": found["after"]}
        | {name: found[name] for name in found if name not in ("before", "after")}
        for text, found in manifest["perplexity"].items()
    }
    parameters = int(manifest["parameters_after"])
    return Row(
        point.name,
        point.method.name,
        point.sparsity,
        point.seed,
        parameters,
        perplexity,
        speed,
        str(directory),
        manifest.get("comparison"),
    )


def check_conditions(rows: Sequence[Row], out: Path) -> None:
    """Check that all models were measured alike.

    Raises:
        OutputError: one was not.
    """

    def conditions(row: Row) -> Perplexities:
        return {text: {**found, "value": None} for text, found in row.perplexity.items()}

    for row in rows:
        if conditions(row) != conditions(rows[0]):
            raise OutputError(
                f"{out / row.name} was not measured as the dense model of its sweep was, perhaps "
                "by another version; delete it and run the sweep again"
            )

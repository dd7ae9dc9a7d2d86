"""What was measured of the models of a sweep, and under which conditions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.errors import OutputError
from cfsp.quality.evaluate import evaluate_models
from cfsp.result.manifest import read_manifest
from cfsp.settings import Compute, EvaluationText
from cfsp.sweep.recipe import Point

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
    """

    name: str
    method: str | None
    sparsity: float
    seed: int | None
    parameters: int
    perplexity: Perplexities
    speed: dict[str, float]
    directory: str | None

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}


def measure_perplexity(model: Path, texts: EvaluationText, compute: Compute) -> Perplexities:
    """Return the perplexity of a model on each text."""
    found: Perplexities = evaluate_models([model], texts, compute)[0]["perplexity"]
    return found


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

"""Measurements that come beside a run: from its manifest, `cfsp eval --json`, `cfsp bench --json`.

Each goes to one side of a run: `before`, the original, or `after`, the run itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cfsp.errors import ReportError
from cfsp.quality.compare import compare
from cfsp.quality.results_file import measured_model
from cfsp.result.conditions import Conditions
from cfsp.result.runs import Measured, RunFacts

_PHASES = ("prefill", "decode")

Side = Callable[[str], str | None]


def with_results(runs: Sequence[RunFacts], results: dict[str, Any]) -> list[RunFacts]:
    """Add what `cfsp eval --json` or `cfsp bench --json` measured to the runs it measured.

    Args:
        runs: the runs of the page.
        results: the object that the command printed. A model in it is one of the runs if it is
            the same directory, and a run's original if it has the name that was pruned.

    Raises:
        ReportError: it is something else, or measures none of the runs.
    """
    try:
        names = [str(model["model"]) for model in results["models"]]
        add = _add_speed if "workloads" in results["models"][0] else _add_scores
        extended = [
            replace(run, measured=add(run.measured, results["models"], run.side_of)) for run in runs
        ]
        if add is _add_scores:
            extended = [_compared(run, results["models"]) for run in extended]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ReportError(
            "the results are not what `cfsp eval --json` or `cfsp bench --json` prints: "
            f"{error!r} is missing or of another type"
        ) from error
    if not any(run.side_of(name) == "after" for run in runs for name in names):
        raise ReportError(f"the results are of none of the runs; they are of: {', '.join(names)}")
    return extended


def with_own_speed(run: RunFacts) -> RunFacts:
    """Add the speeds in a run's manifest, where the demonstration has put them.

    Raises:
        ReportError: they are not what `cfsp bench --json` prints.
    """
    speed = run.manifest.get("speed")
    if not speed:
        return run
    sides = {"dense": "before", "pruned": "after"}
    try:
        return replace(run, measured=_add_speed(run.measured, speed["models"], sides.get))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ReportError(
            f"{run.directory}: the speed in the manifest is damaged: {error!r}"
        ) from error


def _add_scores(measured: Measured, models: Sequence[dict[str, Any]], side_of: Side) -> Measured:
    perplexity = {conditions: dict(sides) for conditions, sides in measured.perplexity.items()}
    tasks = {task: dict(scores) for task, scores in measured.tasks.items()}
    for model in models:
        side = side_of(str(model["model"]))
        if side is None:
            continue
        for text, entry in model["perplexity"].items():
            perplexity.setdefault(Conditions.of(text, entry), {})[side] = float(entry["value"])
        for task, scores in model.get("tasks", {}).items():
            tasks.setdefault(task, {})[side] = dict(scores)
    return replace(measured, perplexity=perplexity, tasks=tasks)


def _compared(run: RunFacts, models: Sequence[dict[str, Any]]) -> RunFacts:
    """Compare a run with its original in pairs, where both were measured for it."""
    sides = {run.side_of(str(model["model"])): model for model in models if "windows" in model}
    if "before" not in sides or "after" not in sides:
        return run
    dense, pruned = (measured_model("the results", sides[side]) for side in ("before", "after"))
    found = compare(dense, pruned, dense).to_json()
    if known := run.measured.comparison:
        found = {**found, "texts": known["texts"] | found["texts"]}
        if not found["tasks"]:
            found |= {name: known[name] for name in ("tasks", "accuracy", "kept", "left_out")}
    return replace(run, measured=replace(run.measured, comparison=found))


def _add_speed(measured: Measured, models: Sequence[dict[str, Any]], side_of: Side) -> Measured:
    speed = {name: dict(sides) for name, sides in measured.speed.items()}
    # Ratios are to the first model; they mean something here only if that is the original.
    compared = side_of(str(models[0]["model"])) == "before"
    for model in models:
        side = side_of(str(model["model"]))
        if side is None:
            continue
        for workload in model["workloads"]:
            shape = f"batch {workload['batch']}, prompt {workload['prompt']}"
            for phase in _PHASES:
                figures = workload[phase]
                known = speed.setdefault(f"{phase}, {shape}", {})
                known[side] = float(figures["tokens_per_second"])
                if side == "after" and compared and not figures.get("too_busy"):
                    known["ratio"] = float(figures["ratio"])
                    if figures["ideal_ratio"] is not None:
                        known["ideal"] = float(figures["ideal_ratio"])
    return replace(measured, speed=speed)

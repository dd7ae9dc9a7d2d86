"""All that a report says about one run, read from its directory: no model is loaded.

A run is a directory that cfsp wrote. Its manifest must be there; plan and statistics may be
missing, and the page then leaves out what they would have shown.

Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfsp.allocation import ModelSize
from cfsp.calibration.statistics import Statistics
from cfsp.errors import ReportError
from cfsp.manifest import MANIFEST_FILE, PLAN_FILE, STATISTICS_FILE, read_manifest
from cfsp.pruning_plan import PruningPlan


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        name: what the page calls it; differs between the runs of one page.
        directory: where it lies.
        manifest: its `cfsp.json`.
        weight_bytes: size of its weight files on disk.
        plan: which channels stayed, if the file is there.
        statistics: of its calibration, if the file is there.
        perplexity: text -> {"before", "after", "tokens"}; either side may be missing.
        tasks: task -> {"before", "after"} -> scores as `cfsp eval --json` gives them.
    """

    name: str
    directory: Path
    manifest: dict[str, Any]
    weight_bytes: int
    plan: PruningPlan | None = None
    statistics: Statistics | None = None
    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @property
    def base_name(self) -> str:
        """How the user called the model that was pruned."""
        return str(self.manifest.get("base_model", {}).get("name", "the original"))

    @property
    def base_fingerprint(self) -> str:
        """Digest of the model that was pruned; the name where there is none."""
        return str(self.manifest.get("base_model", {}).get("fingerprint", self.base_name))

    @property
    def restored_blocks(self) -> list[dict[str, Any]]:
        """One entry for each block; empty without restoration."""
        blocks: list[dict[str, Any]] = (self.manifest.get("restoration") or {}).get("blocks", [])
        return blocks

    @property
    def size(self) -> ModelSize | None:
        """The numbers that a budget is about; None if the manifest cannot tell.

        What one channel owns follows from parameters and channels before and after. That it is
        the same in every block holds for all known families.
        """
        try:
            before = list(self.manifest["widths_before"])
            after = list(self.manifest["intermediate_sizes"])
            parameters = int(self.manifest["parameters_before"])
            removed = parameters - int(self.manifest["parameters_after"])
        except KeyError:
            return None
        channels = sum(before) - sum(after)
        if channels == 0 or removed % channels:
            return None
        return ModelSize(tuple(before), (removed // channels,) * len(before), parameters)


def read_run(directory: Path) -> RunFacts:
    """Read the facts about one run.

    Raises:
        ReportError: cfsp did not write the directory.
        CfspError: a file in it is damaged.
    """
    if not directory.is_dir():
        raise ReportError(f"{directory} is not a directory; expected one that cfsp prune wrote")
    manifest = read_manifest(directory)
    if manifest is None:
        raise ReportError(
            f"{directory} has no {MANIFEST_FILE}; a report needs a directory that cfsp prune "
            "or cfsp recover wrote"
        )
    plan, statistics = directory / PLAN_FILE, directory / STATISTICS_FILE
    facts = RunFacts(
        name=directory.resolve().name,
        directory=directory,
        manifest=manifest,
        weight_bytes=sum(file.stat().st_size for file in directory.glob("model*.safetensors")),
        plan=PruningPlan.load(plan) if plan.is_file() else None,
        statistics=Statistics.load(statistics) if statistics.is_file() else None,
        perplexity=dict(manifest.get("perplexity") or {}),
    )
    _check_together(facts)
    return facts


def read_runs(directories: Sequence[Path]) -> list[RunFacts]:
    """Read several runs and give each a name of its own.

    Raises:
        CfspError: as `read_run`.
    """
    runs = [read_run(directory) for directory in directories]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run.directory)) for run in runs
    ]


def with_results(runs: Sequence[RunFacts], results: dict[str, Any]) -> list[RunFacts]:
    """Add what `cfsp eval --json` measured to the runs that it measured.

    Args:
        runs: the runs of the page.
        results: the object that the command printed. A model in it is one of the runs if it is
            the same directory, and a run's original if it has the name that was pruned.

    Raises:
        ReportError: it is something else, or measures none of the runs.
    """
    try:
        models = [
            (str(model["model"]), dict(model["perplexity"]), dict(model["tokens"]),
             dict(model.get("tasks", {})))
            for model in results["models"]
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(
            "the results are not what `cfsp eval --json` prints; expected an object with models"
        ) from error
    found = False
    extended = []
    for run in runs:
        perplexity = {text: dict(values) for text, values in run.perplexity.items()}
        tasks = {task: dict(scores) for task, scores in run.tasks.items()}
        for name, values, tokens, scores in models:
            side = _side(run, name)
            if side is None:
                continue
            found = found or side == "after"
            for text, value in values.items():
                perplexity.setdefault(text, {}).update({side: value, "tokens": tokens[text]})
            for task, score in scores.items():
                tasks.setdefault(task, {})[side] = score
        extended.append(replace(run, perplexity=perplexity, tasks=tasks))
    if not found:
        raise ReportError(
            "the results are of none of the runs; they are of: "
            + ", ".join(name for name, *_ in models)
        )
    return extended


def _side(run: RunFacts, name: str) -> str | None:
    if Path(name).resolve() == run.directory.resolve():
        return "after"
    return "before" if name == run.base_name else None


def _check_together(facts: RunFacts) -> None:
    """Check that manifest, plan and statistics speak of the same blocks.

    Raises:
        ReportError: they do not.
    """
    plan, statistics = facts.plan, facts.statistics
    widths = [block.width for block in plan.blocks] if plan else None
    kept = plan.kept_widths if plan else None
    said = facts.manifest.get("widths_before", widths), facts.manifest.get("intermediate_sizes")
    if widths is not None and (said[0] != widths or (said[1] or kept) != kept):
        raise ReportError(
            f"{facts.directory}: {PLAN_FILE} and {MANIFEST_FILE} give different widths; "
            "they are of different runs"
        )
    if statistics is not None and widths is not None:
        measured = [len(block.sum_F) for block in statistics.blocks]
        if measured != widths:
            raise ReportError(
                f"{facts.directory}: {STATISTICS_FILE} and {PLAN_FILE} give different widths; "
                "they are of different runs"
            )
    restored = facts.restored_blocks
    if restored and widths is not None and len(restored) != len(widths):
        raise ReportError(
            f"{facts.directory}: {MANIFEST_FILE} tells of {len(restored)} restored blocks, "
            f"the plan of {len(widths)}; they are of different runs"
        )

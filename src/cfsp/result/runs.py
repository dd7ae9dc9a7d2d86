"""All that a report says about one run, read from its directory: no model is loaded.

A run is a directory that cfsp wrote. Its manifest must be there; the plan may be missing, and
the page then leaves out what it would have shown. The directory of a sweep stands
for its runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE, RECIPE_FILE
from cfsp.errors import ReportError
from cfsp.planning.plan_file import PruningPlan
from cfsp.repair.ridge_pass import NAME as RIDGE
from cfsp.result.conditions import Conditions
from cfsp.result.manifest import read_manifest
from cfsp.result.manifest_check import check_manifest
from cfsp.result.repair_steps import Step, repair_steps


@dataclass(frozen=True)
class Measured:
    """Quality and speed; `before` is the original, `after` the run. Either may be missing.

    Attributes:
        perplexity: conditions -> {"before", "after"}; numbers under one key compare.
        tasks: task -> {"before", "after"} -> scores as `cfsp eval --json` gives them.
        comparison: with the original, window by window and document by document (see
            `cfsp.quality.compare.Comparison.to_json`); None where nothing was compared.
        speed: phase and workload -> {"before", "after"} in tokens per second, {"ratio", "ideal"}.
    """

    perplexity: dict[Conditions, dict[str, float]] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    speed: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        name: what the page calls it; differs between the runs of one page.
        directory: where it lies.
        manifest: its `cfsp.json`.
        weight_bytes: size of its weight files on disk.
        plan: which channels stayed, if the file is there.
        measured: quality and speed.
    """

    name: str
    directory: Path
    manifest: dict[str, Any]
    weight_bytes: int
    plan: PruningPlan | None = None
    measured: Measured = field(default_factory=Measured)

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
    def repair_steps(self) -> list[Step]:
        """The steps of repair; empty without repair."""
        return repair_steps(self.manifest)

    @property
    def recovery_history(self) -> list[dict[str, float]]:
        """Step, held-out perplexity and, where there is one, loss; empty without recovery."""
        history: list[dict[str, float]] = (self.manifest.get("recovery") or {}).get("history", [])
        return history


def read_run(directory: Path) -> RunFacts:
    """Read the facts about one run.

    Raises:
        ReportError: cfsp did not write the directory.
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
    check_manifest(manifest, directory)
    plan = directory / PLAN_FILE
    facts = RunFacts(
        name=directory.resolve().name,
        directory=directory,
        manifest=manifest,
        weight_bytes=sum(file.stat().st_size for file in directory.glob("model*.safetensors")),
        plan=PruningPlan.load(plan) if plan.is_file() else None,
        measured=Measured(perplexity=_perplexity(manifest), comparison=manifest.get("comparison")),
    )
    _check_together(facts)
    return facts


def read_runs(directories: Sequence[Path]) -> list[RunFacts]:
    """Read several runs and give each a name of its own; a sweep stands for its runs.

    Raises:
        CfspError: as `read_run`.
    """
    runs = [read_run(each) for directory in directories for each in _runs_in(directory)]
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run.directory)) for run in runs
    ]


def _runs_in(directory: Path) -> list[Path]:
    """Return the finished runs of a sweep's directory; another directory is a run itself."""
    if not (directory / RECIPE_FILE).is_file() or (directory / MANIFEST_FILE).is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob(f"*/{MANIFEST_FILE}"))
    runs = [run for run in found if not run.name.startswith(".")]
    if not runs:
        raise ReportError(
            f"the sweep in {directory} has no finished model yet; run it on: "
            f"cfsp sweep --recipe {directory / RECIPE_FILE} --out {directory}"
        )
    return runs


def _perplexity(manifest: dict[str, Any]) -> dict[Conditions, dict[str, float]]:
    """Return perplexities of the original and of this run.

    A recovered run's manifest keeps what was measured when it was pruned; the run itself is
    what recovery measured, and compares with the original where the conditions are the same.
    """
    found: dict[Conditions, dict[str, float]] = defaultdict(dict)
    recovery = manifest.get("recovery")
    for text, value in (manifest.get("perplexity") or {}).items():
        sides = ("before",) if recovery else ("before", "after")
        found[Conditions.of(text, value)] |= {side: value[side] for side in sides}
    for text, value in (recovery or {}).get("perplexity", {}).items():
        found[Conditions.of(text, value)]["after"] = value["after"]
    return {key: sides for key, sides in found.items() if "after" in sides}


def _check_together(facts: RunFacts) -> None:
    """Check that manifest and plan speak of the same blocks.

    Raises:
        ReportError: they do not.
    """
    plan = facts.plan
    base = (facts.manifest.get("base_model") or {}).get("fingerprint")
    if plan is not None and base is not None and plan.model.fingerprint != base:
        raise ReportError(
            f"{facts.directory}: {PLAN_FILE} and {MANIFEST_FILE} speak of different models; "
            "they are of different runs"
        )
    widths, kept = plan.widths_of("ffn") if plan else (None, None)
    said = facts.manifest.get("widths_before", widths), facts.manifest.get("intermediate_sizes")
    if widths is not None and (said[0] != widths or (said[1] or kept) != kept):
        raise ReportError(
            f"{facts.directory}: {PLAN_FILE} and {MANIFEST_FILE} give different widths; "
            "they are of different runs"
        )
    for step in facts.repair_steps:
        if plan is not None and step["blocks"] and not _speaks_of_same(step, plan):
            raise ReportError(
                f"{facts.directory}: {MANIFEST_FILE} tells of {len(step['blocks'])} blocks that "
                f"{step['name']} repaired, the plan of {len(plan.units)}; they are of different "
                "runs"
            )


def _speaks_of_same(step: Step, plan: PruningPlan) -> bool:
    """Return whether a step of repair has an entry for every unit of a plan."""
    blocks = [unit.block for unit in plan.units]
    is_by_unit = any("block" in entry for entry in step["blocks"] if entry)
    # Other steps speak of blocks also where these have several.
    has_several = plan.has_ffns_only and len(set(blocks)) < len(blocks)
    if is_by_unit or (has_several and step["name"] == RIDGE):
        pairs = zip(step["blocks"], blocks, strict=False)
        return len(step["blocks"]) == len(blocks) and all(
            entry is None or entry.get("block") == block for entry, block in pairs
        )
    if plan.has_one_unit_each:
        return len(step["blocks"]) == len(blocks)
    return len(step["blocks"]) > blocks[-1]

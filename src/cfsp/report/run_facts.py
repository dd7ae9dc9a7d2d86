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

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE, STATISTICS_FILE, statistics_in
from cfsp.errors import ReportError
from cfsp.planning.allocation import ModelSize
from cfsp.planning.plan_file import PruningPlan
from cfsp.report.manifest_check import check_manifest
from cfsp.result.manifest import read_manifest


@dataclass(frozen=True)
class Measured:
    """Quality and speed; `before` is the original, `after` the run. Either may be missing.

    Attributes:
        perplexity: text -> {"before", "after", "tokens"}.
        tasks: task -> {"before", "after"} -> scores as `cfsp eval --json` gives them.
        speed: phase and workload -> {"before", "after"} in tokens per second, {"ratio", "ideal"}.
    """

    perplexity: dict[str, dict[str, float]] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
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
        statistics: of its calibration, if the file is there.
        measured: quality and speed.
    """

    name: str
    directory: Path
    manifest: dict[str, Any]
    weight_bytes: int
    plan: PruningPlan | None = None
    statistics: Statistics | None = None
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
    def restored_blocks(self) -> list[dict[str, Any]]:
        """One entry for each block; empty without restoration."""
        blocks: list[dict[str, Any]] = (self.manifest.get("restoration") or {}).get("blocks", [])
        return blocks

    def reconstructed_blocks(self, step: str) -> list[dict[str, Any] | None]:
        """How `sequential` or `local` repair of each block went, as the manifest has it.

        None for a block that has no error of its own: blocks that train together share one.
        """
        return [block.get(step) for block in self.restored_blocks]

    @property
    def recovery_history(self) -> list[dict[str, float]]:
        """Step, held-out perplexity and, where there is one, loss; empty without recovery."""
        history: list[dict[str, float]] = (self.manifest.get("recovery") or {}).get("history", [])
        return history

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
    check_manifest(manifest, directory)
    plan, statistics = directory / PLAN_FILE, statistics_in(directory)
    facts = RunFacts(
        name=directory.resolve().name,
        directory=directory,
        manifest=manifest,
        weight_bytes=sum(file.stat().st_size for file in directory.glob("model*.safetensors")),
        plan=PruningPlan.load(plan) if plan.is_file() else None,
        statistics=Statistics.load(statistics) if statistics else None,
        measured=Measured(perplexity=_perplexity(manifest)),
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


def _perplexity(manifest: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return perplexities of the original and of this run.

    A recovered run's manifest keeps what was measured when it was pruned; the run itself is
    what recovery measured, and compares with the original where the tokens are the same.
    """
    pruned: dict[str, dict[str, float]] = dict(manifest.get("perplexity") or {})
    if "recovery" not in manifest:
        return pruned
    found = {}
    for text, value in (manifest["recovery"].get("perplexity") or {}).items():
        earlier = pruned.get(text, {})
        found[text] = {"after": value["after"], "tokens": value["tokens"]}
        if earlier.get("tokens") == value["tokens"]:
            found[text]["before"] = earlier["before"]
    return found


def _check_together(facts: RunFacts) -> None:
    """Check that manifest, plan and statistics speak of the same blocks.

    Raises:
        ReportError: they do not.
    """
    plan, statistics = facts.plan, facts.statistics
    base = (facts.manifest.get("base_model") or {}).get("fingerprint")
    if plan is not None and base is not None and plan.model.fingerprint != base:
        raise ReportError(
            f"{facts.directory}: {PLAN_FILE} and {MANIFEST_FILE} speak of different models; "
            "they are of different runs"
        )
    widths = [block.width for block in plan.blocks] if plan else None
    kept = plan.kept_widths if plan else None
    said = facts.manifest.get("widths_before", widths), facts.manifest.get("intermediate_sizes")
    if widths is not None and (said[0] != widths or (said[1] or kept) != kept):
        raise ReportError(
            f"{facts.directory}: {PLAN_FILE} and {MANIFEST_FILE} give different widths; "
            "they are of different runs"
        )
    if statistics is not None and widths is not None:
        measured = [block.width for block in statistics.blocks]
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

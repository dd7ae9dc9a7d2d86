"""Target `uniform`: the base model pruned again, to the same number of channels in every block.

Widths can't be evened out in a pruned checkpoint: channels that are gone would be needed. So
the plan is made anew from the statistics that the checkpoint carries, with the block metric
`uniform`, and obeyed on the base model. The result is another model, in the plain stock class;
uniform widths usually cost quality, so evaluate it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.families import intermediate_sizes
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE, STATISTICS_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cut.surgery import pruned_tensor
from cfsp.errors import CheckpointError, ExportError, StatisticsError
from cfsp.exports import padded
from cfsp.exports.target import ExportOptions, Target, Written
from cfsp.exports.verification import Verification, logits_of, probe_tokens, reference_model
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.manifest import read_manifest
from cfsp.settings import Budget, CalibrationText, Criterion, PruneSettings, Repair

# How a model is repaired again, by how it was. Others are by ridge; training is not repeated.
_REPEATED: dict[str | None, Repair] = {None: "none", "sequential": "sequential"}
_INSTEAD = "use --to padded, or prune the base model with --block-metric uniform"


@dataclass(frozen=True)
class _Origin:
    """What a pruned checkpoint was made of.

    Attributes:
        base: the model that was pruned.
        plan: how.
        statistics: of the calibration.
        restoration: the method of its repair; None without.
    """

    base: Checkpoint
    plan: PruningPlan
    statistics: Statistics
    restoration: str | None


def write(source: Checkpoint, out: Path, options: ExportOptions) -> Written:
    """Prune the base model again into an existing, empty directory."""
    padded.check_stock_can_express(source)
    widths = intermediate_sizes(source.config)
    if len(set(widths)) == 1:
        return padded.write(source, out, options)
    origin = _origin(source)
    width = uniform_width(widths, _base_width(origin.base), origin.plan.criterion["multiple"])
    calibration = origin.plan.calibration
    settings = PruneSettings(
        budget=Budget(
            1 - width / _base_width(origin.base), "ffn", origin.plan.criterion["multiple"]
        ),
        criterion=Criterion("uniform", origin.plan.criterion["channel_metric"]),
        text=CalibrationText(
            tuple(calibration["sources"]),
            calibration["windows"],
            calibration["seqlen"],
            calibration["seed"],
        ),
        repair=_REPEATED.get(origin.restoration, "ridge"),
    )
    report = prune_checkpoint(
        origin.base, out, settings, statistics=origin.statistics, command=options.command
    )
    if set(report.intermediate_sizes) != {width}:
        raise ExportError(
            f"no uniform plan of {width} channels a block exists (found widths "
            f"{sorted(set(report.intermediate_sizes))}); {_INSTEAD}"
        )
    _say_where_it_lies(out, options.destination)
    before, after = sum(widths), width * len(widths)
    notes = [
        f"pruned again from {origin.base.label}: {after:,} channels where {source.label} has "
        f"{before:,}; it is another model, so evaluate it"
    ]
    if origin.restoration == "local":
        notes.append("repaired by ridge: the local reconstruction of the source was not repeated")
    return Written(
        f"{source.family.causal_lm}, {len(widths)} blocks of {width} channels", tuple(notes)
    )


def verify(source: Checkpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare the weights with the base model's kept channels, and run the stock class.

    The down projections may have been repaired; everything else must be equal bit by bit.
    """
    if len(set(intermediate_sizes(source.config))) == 1:
        return padded.verify(source, out, options)
    copy = Checkpoint(out)
    plan = PruningPlan.load(out / PLAN_FILE)
    base = _origin(source).base
    for name in base.specs:
        repaired = name.endswith(f".{base.family.down}.weight") and _was_restored(out)
        if not repaired and not torch.equal(copy.read(name), pruned_tensor(base, plan, name)):
            raise ExportError(f"{name} is not what the plan leaves of it; nothing was kept")
    tokens = probe_tokens(source)
    logits_TV = logits_of(reference_model(copy), tokens)
    if not bool(torch.isfinite(logits_TV).all()):
        raise ExportError("the re-planned model computes NaN or infinity; nothing was kept")
    return Verification("transformers (weights; logits are another model's)", 0, 0.0, 0.0, 0.0)


def uniform_width(widths: list[int], base_width: int, multiple: int) -> int:
    """Return the multiple nearest to the mean width, at least one multiple."""
    mean = sum(widths) / len(widths)
    return min(base_width, max(multiple, round(mean / multiple) * multiple))


def _origin(source: Checkpoint) -> _Origin:
    manifest = read_manifest(source.directory)
    if manifest is None:
        raise ExportError(
            f"{source.label} was not pruned by cfsp (it has no {MANIFEST_FILE}), so it cannot be "
            "planned again; use --to padded"
        )
    if manifest.get("operation") != "prune":
        raise ExportError(
            f"the weights of {source.label} were trained after pruning, which a new plan would "
            f"lose; {_INSTEAD} and recover it"
        )
    path = source.directory / STATISTICS_FILE
    if not path.is_file():
        raise ExportError(
            f"{source.label} carries no statistics ({STATISTICS_FILE}) to plan from; {_INSTEAD}"
        )
    plan = PruningPlan.load(source.directory / PLAN_FILE)
    try:
        base = open_checkpoint(plan.model.name)
        statistics = Statistics.load(path)
        plan.check_fits(base)
    except (CheckpointError, StatisticsError) as error:
        raise ExportError(
            f"the base model of {source.label} is needed to plan again: {error}; {_INSTEAD}"
        ) from error
    return _Origin(base, plan, statistics, (manifest.get("restoration") or {}).get("method"))


def _base_width(base: Checkpoint) -> int:
    widths = set(intermediate_sizes(base.config))
    if len(widths) > 1:
        raise ExportError(f"the blocks of the base model {base.label} differ; use --to padded")
    return widths.pop()


def _was_restored(directory: Path) -> bool:
    manifest = read_manifest(directory)
    return bool(manifest and manifest.get("restoration"))


def _say_where_it_lies(directory: Path, destination: str) -> None:
    """Put the final place into the manifest, which was written aside."""
    path = directory / MANIFEST_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**fields, "out": destination}, indent=2) + "\n", encoding="utf-8")


TARGET = Target("uniform", "", write, verify)

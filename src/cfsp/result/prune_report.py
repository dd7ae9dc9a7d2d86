"""What pruning did, as a value: for people, `--json` and the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cfsp.checkpoint.loading import own_dtype
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint, WeightSource
from cfsp.cut.surgery import PrunedSource
from cfsp.planning.plan_file import PruningPlan
from cfsp.repair.result import PruningResult
from cfsp.result.manifest import digest_of_plan, read_manifest, refusing_damage
from cfsp.streaming.memory import peak_rss_bytes
from cfsp.streaming.runtime import versions
from cfsp.streaming.work_dir import WorkDir


@dataclass(frozen=True)
class PruneReport:
    """What pruning did. Everything but `plan` is also in the manifest.

    Attributes:
        parameters_before: of the source; tied embeddings count once.
        parameters_after: of the result.
        blocks_before: of the source.
        ffn_sparsity: fraction of FFN channels removed, counted by the parameters that they own.
        model_sparsity: fraction of all parameters removed.
        intermediate_sizes: channels of every FFN unit of the result, in the order of blocks.
        kv_groups: KV groups of every attention `before` and `after`, in the order of blocks, and
            the `sparsity`; empty where none may go.
        experts: routed experts of every block that has them `before` and `after`, the `sparsity`,
            and by block that stays the share of what all add that those added which went
            (`lost_output`); empty where none went but with their block.
        calibration_tokens: that the statistics were gathered over.
        repair: what each step of repair did with each block (see `cfsp.repair.result`).
        experts_with_few_tokens: block, expert and tokens of each expert that saw too few
            calibration tokens to be scored by them: its channels were scored by its weights alone,
            and whether it went whole was decided by these few.
        goal: what was asked for instead of a sparsity, what was tried, and what was `chosen`
            (see `cfsp.selection`); under `max_loss_increase` also `result`, the increase of the
            finished model; empty without a goal.
        perplexity: text -> {"before", "after", "tokens"}, if it was measured; of what `cfsp.prune`
            trained, `after` is after both.
        dequantised: {"from", "to"}, how the source is stored and the dtype that its quantised
            weights have in the result; empty where the source is not quantised.
        seconds: stage -> seconds.
        passes: pass over the blocks -> seconds by part, and `ratio`, its time as a multiple of
            the time for pure computing.
        peak_rss_bytes: largest resident memory of the process.
        out: the new checkpoint; None after a dry run.
        plan: the decision.
    """

    parameters_before: int
    parameters_after: int
    blocks_before: int
    ffn_sparsity: float
    model_sparsity: float
    intermediate_sizes: list[int]
    kv_groups: dict[str, Any]
    experts: dict[str, Any]
    calibration_tokens: int
    repair: dict[str, Any]
    experts_with_few_tokens: list[dict[str, Any]]
    goal: dict[str, Any]
    perplexity: dict[str, dict[str, float]]
    dequantised: dict[str, str]
    seconds: dict[str, float]
    passes: dict[str, dict[str, float]]
    peak_rss_bytes: int
    out: str | None
    plan: PruningPlan = field(repr=False)

    @staticmethod
    def of_checkpoint(directory: Path) -> PruneReport:
        """Return what pruning did to the checkpoint that it left in a directory."""
        told = (read_manifest(directory) or {}) | {
            "out": str(directory),
            "plan": PruningPlan.load(directory / PLAN_FILE),
        }
        with refusing_damage(directory):
            return PruneReport(**{each.name: told[each.name] for each in fields(PruneReport)})

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON types; of the plan widths, channels, and what went whole."""
        told = {name: value for name, value in vars(self).items() if name != "plan"}
        keys = ("removed_blocks", "removed_attentions")  # each only where some went
        removed = {key: list(getattr(self.plan, key)) for key in keys if getattr(self.plan, key)}
        units = self.plan.of_part("ffn")
        channels = {
            "before": sum(unit.ffns * unit.width for unit in units),
            "after": sum(len(unit.kept) for unit in units),
        }
        widths = self.plan.widths_of("ffn")[0]
        return {"widths_before": widths, "ffn_channels": channels, **removed, **told}

    def to_manifest(
        self, digests: dict[str, str], command: str, history: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the manifest of the checkpoint.

        It has digests of its files, the command, and the history of the model before.
        """
        return {
            "operation": "prune",
            "command": command,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "base_model": asdict(self.plan.model) | history,
            "criterion": self.plan.criterion,
            "calibration": self.plan.calibration,
            "plan_digest": digest_of_plan(self.plan),
            "files": digests,
            **self.to_json(),
        }


def _experts(plan: PruningPlan) -> dict[str, Any]:
    units = [unit for unit in plan.kept_units if unit.loses_experts]
    if not units:
        return {}
    before = [unit.ffns for unit in plan.units if unit.ffns > 1]
    after = [len(unit.kept_ffns) for unit in units]
    return {
        "before": before,
        "after": after,
        "sparsity": round(1 - sum(after) / sum(before), 6),
        "lost_output": [unit.lost_output for unit in units],
    }


def _read_by(repaired: PruningResult) -> dict[str, Any]:
    """Return what the steps of repair read, as `text`; nothing if there were none."""
    record = repaired.repaired_on
    if record is None or not repaired.steps:
        return {}
    names = ("sources", "windows", "seqlen", "tokens_digest")
    return {"text": {name: getattr(record, name) for name in names}}


def dequantisation(source: WeightSource) -> dict[str, str]:
    """Return how a model is stored and what dtype its weights are made; empty if not quantised."""
    if not isinstance(source, Checkpoint) or source.quantisation is None:
        return {}
    dtype = str(own_dtype(source)).removeprefix("torch.")
    return {"from": source.quantisation.method, "to": dtype}


def prune_report(
    source: WeightSource,
    repaired: PruningResult,
    goal: dict[str, Any],
    measured: dict[str, dict[str, float]],
    work_dir: WorkDir,
    out: Path | None,
) -> PruneReport:
    """Return what a run did; `work_dir` has the times of stages and passes."""
    plan, before = repaired.plan, source.parameter_count
    groups_before, groups_after = plan.widths_of("kv")
    kv_sparsity = round(plan.sparsity_of("kv"), 6)
    groups = {"before": groups_before, "after": groups_after, "sparsity": kv_sparsity}
    after = PrunedSource(source, plan).parameter_count
    return PruneReport(
        parameters_before=before,
        parameters_after=after,
        blocks_before=source.architecture.block_count,
        ffn_sparsity=round(plan.ffn_sparsity, 6),
        model_sparsity=round(1 - after / before, 6),
        intermediate_sizes=plan.widths_of("ffn")[1],
        kv_groups=groups if groups_before else {},
        experts=_experts(plan),
        calibration_tokens=plan.calibration["windows"] * plan.calibration["seqlen"],
        repair={"steps": list(repaired.steps), **_read_by(repaired)},
        experts_with_few_tokens=plan.experts_with_few_tokens,
        goal=goal,
        perplexity=measured,
        dequantised=dequantisation(source),
        seconds=dict(work_dir.watch.seconds),
        passes=work_dir.times_json(),
        peak_rss_bytes=peak_rss_bytes(),
        out=str(out) if out else None,
        plan=plan,
    )

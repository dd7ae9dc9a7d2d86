"""What pruning did, as a value: for people, `--json` and the manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.reading import WeightSource, parameter_count
from cfsp.cut.surgery import added_specs
from cfsp.engine.memory import peak_rss_bytes
from cfsp.engine.stopwatch import Stopwatch
from cfsp.engine.workplace import Workplace
from cfsp.planning.make import model_size
from cfsp.planning.plan_file import PruningPlan
from cfsp.repair.decision import Decision

if TYPE_CHECKING:
    from cfsp.repair.fused import Repair, RestoredBlock


@dataclass(frozen=True)
class PruneReport:
    """What pruning did. Everything but `plan` is also in the manifest.

    Attributes:
        parameters_before: parameters of the source; tied embeddings count once.
        parameters_after: parameters of the result.
        ffn_sparsity: fraction of FFN channels removed.
        model_sparsity: fraction of all parameters removed.
        intermediate_sizes: FFN channels of every block.
        calibration_tokens: tokens that the statistics were gathered over.
        restoration: the method and, for each block, its strength and its error before and
            after (see `RestoredBlock`), and under `sequential` and `local` those of further
            steps (see `ReconstructedBlocks`); no blocks under `bias`; empty without restoration.
        experts_with_few_tokens: block, expert and tokens of each expert that saw too few
            calibration tokens to be scored by them, and was scored by its weights alone.
        goal: what was asked for instead of a sparsity, what was tried, and the budget that it came
            to (see `Resolution`); under `max_loss_increase` also `result`, the increase of the
            finished model; empty without a goal.
        perplexity: text -> {"before", "after", "tokens"}, if it was measured.
        seconds: stage -> seconds.
        passes: pass over the blocks -> seconds by part, and `ratio`, its time as a multiple of
            the time for pure computing.
        peak_rss_bytes: largest resident memory of the process.
        out: the new checkpoint; None after a dry run.
        plan: the decision.
    """

    parameters_before: int
    parameters_after: int
    ffn_sparsity: float
    model_sparsity: float
    intermediate_sizes: list[int]
    calibration_tokens: int
    restoration: dict[str, Any]
    experts_with_few_tokens: list[dict[str, int]]
    goal: dict[str, Any]
    perplexity: dict[str, dict[str, float]]
    seconds: dict[str, float]
    passes: dict[str, dict[str, float]]
    peak_rss_bytes: int
    out: str | None
    plan: PruningPlan = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the plan, as JSON types."""
        return {k: v for k, v in vars(self).items() if k != "plan"}


def prune_report(
    source: WeightSource,
    decision: Decision,
    goal: dict[str, Any],
    measured: dict[str, dict[str, float]],
    watch: Stopwatch,
    place: Workplace,
    out: Path | None,
) -> PruneReport:
    """Return what a run did.

    Args:
        source: the model.
        decision: what was decided and repaired.
        goal: what a goal came to, as JSON types; empty without one.
        measured: perplexities (see `before_and_after`).
        watch: has the time of every stage.
        place: has the times of every pass.
        out: the new checkpoint; None if none was written.
    """
    plan = decision.plan
    before = parameter_count(source)
    added = added_specs(source, decision.repaired_tensors).values()
    after = model_size(source).parameters_with(plan.kept_widths) + sum(s.elements for s in added)
    return PruneReport(
        parameters_before=before,
        parameters_after=after,
        ffn_sparsity=round(plan.ffn_sparsity, 6),
        model_sparsity=round(1 - after / before, 6),
        intermediate_sizes=plan.kept_widths,
        calibration_tokens=plan.calibration["windows"] * plan.calibration["seqlen"],
        restoration=_describe_restoration(decision),
        experts_with_few_tokens=plan.experts_with_few_tokens,
        goal=goal,
        perplexity=measured,
        seconds=dict(watch.seconds),
        passes=place.times_json(),
        peak_rss_bytes=peak_rss_bytes(),
        out=str(out) if out else None,
        plan=plan,
    )


def _describe_restoration(decision: Decision) -> dict[str, Any]:
    if decision.biases is not None:
        return {"method": "bias", "left_alone": [], "blocks": []}
    if not decision.restored:
        return {}
    blocks = [
        {**_errors(block), **({"experts": experts} if len(experts) > 1 else {})}
        for block in decision.restored
        for experts in [[_errors(r) | {"few_tokens": r.few_tokens} for r in block.repairs]]
    ]
    left_alone = [i for i, block in enumerate(decision.restored) if block.ridge is None]
    method = "ridge"
    for name, results in (("sequential", decision.refitted), ("local", decision.reconstructed)):
        method = name if results else method
        for fields, block in zip(blocks, results, strict=False):
            if block is not None:
                fields[name] = block.to_json()
    return {"method": method, "left_alone": left_alone, "blocks": blocks}


def _errors(repair: Repair | RestoredBlock) -> dict[str, Any]:
    return {
        "ridge": repair.ridge,
        "error_before": round(repair.error_before, 6),
        "error_after": round(repair.error_after, 6),
    }

"""The demonstration: a real trained model, real text, no hub, a few minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.allocation import Budget
from cfsp.checkpoint.locating import DEMO_NAME, open_checkpoint
from cfsp.loading import load
from cfsp.pipeline import PruneReport, prune_checkpoint
from cfsp.settings import CalibrationText, EvaluationText, PruneSettings
from cfsp.speed import Speed, SpeedConditions, measure_decode, measure_prefill


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured.

    Attributes:
        report: of the pruning.
        speed: `prefill` and `decode` -> `dense` and `pruned` -> speed.
    """

    report: PruneReport
    speed: dict[str, dict[str, Speed]]

    def speed_json(self) -> dict[str, Any]:
        """Return the speeds as JSON types."""
        return {
            phase: {name: vars(speed) for name, speed in speeds.items()}
            for phase, speeds in self.speed.items()
        }


def run_demo(out: Path, sparsity: float) -> DemoResult:
    """Prune SmolLM2-135M on Python's documentation; measure quality and speed.

    Raises:
        CheckpointError: the package that carries the model is not installed.
        OutputError: `out` exists and is not empty.
    """
    source = open_checkpoint(DEMO_NAME)
    report = prune_checkpoint(
        source,
        out,
        PruneSettings(Budget(sparsity), text=CalibrationText(("python-docs",), samples=32)),
        evaluation=EvaluationText(("python-docs", "python-source"), windows=8),
        command=f"cfsp demo --out {out} --sparsity {sparsity}",
    )
    models = {"dense": load(source.directory), "pruned": load(out)}
    conditions = SpeedConditions(batch=1, prompt=512, new_tokens=32, rounds=5)
    speed = {
        "prefill": measure_prefill(models, conditions),
        "decode": measure_decode(models, conditions),
    }
    return DemoResult(report, speed)

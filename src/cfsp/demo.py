"""The demonstration: a real trained model, real text, no hub, a few minutes on two cores."""

from __future__ import annotations

from pathlib import Path

from cfsp.checkpoint.locating import DEMO_NAME, open_checkpoint
from cfsp.checkpoint.output import check_output_is_free
from cfsp.pipeline import prune_checkpoint
from cfsp.result.manifest import add_to_manifest
from cfsp.result.page.page import write_report
from cfsp.result.prune_report import PruneReport
from cfsp.settings import Budget, CalibrationText, EvaluationText, PruneSettings
from cfsp.speed.bench import Comparison, compare_speed
from cfsp.speed.subjects import Conditions, Subject, Workload
from cfsp.text.offline import MIXED


def run_demo(out: Path, sparsity: float) -> tuple[PruneReport, Comparison, Path]:
    """Prune SmolLM2-135M on the mixed text; measure quality and speed; write the page of it.

    Raises:
        CheckpointError: the package that carries the model is not installed.
        OutputError: `out` exists and is not empty.
    """
    # Nine windows of each kind, short ones: so it takes minutes on a busy machine, too.
    text = CalibrationText((MIXED,), samples=81, seqlen=128)
    evaluation = EvaluationText((MIXED, "python-docs"), windows=9, seqlen=256)
    settings = PruneSettings(Budget(sparsity), text=text, evaluation=evaluation)
    # Before the model is converted, which takes a while.
    check_output_is_free(out)
    source = open_checkpoint(DEMO_NAME)
    command = f"cfsp demo --out {out} --sparsity {sparsity}"
    report = prune_checkpoint(source, out, settings, command=command)
    speed = compare_speed(
        [Subject(source.directory, "dense"), Subject(out, "pruned")],
        [Workload(batch=1, prompt=512, new_tokens=32)],
        Conditions(warmups=1, rounds=5),
    )
    add_to_manifest(out, {"speed": speed.to_json()})
    page = out / "report.html"
    write_report([out], page)
    return report, speed, page

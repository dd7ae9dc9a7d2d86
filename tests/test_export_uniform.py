"""Uniform: the base model planned again at the same size, and refusals where it can't be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cfsp.checkpoint.families import intermediate_sizes
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.errors import ExportError
from cfsp.exports.registry import export_checkpoint
from cfsp.exports.uniform import uniform_width
from cfsp.pipeline import prune_checkpoint
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import Budget, CalibrationText, PruneSettings, Repair


@pytest.fixture
def prune(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> Callable[[Repair], Checkpoint]:
    def get(restore: Repair) -> Checkpoint:
        settings = PruneSettings(
            Budget(0.5, multiple=8),
            text=CalibrationText((str(text_file),), samples=6, seqlen=32),
            repair=restore,
        )
        prune_checkpoint(Checkpoint(tiny_checkpoint("llama")), tmp_path / "pruned", settings)
        return Checkpoint(tmp_path / "pruned")

    return get


@pytest.mark.parametrize("restore", ["none", "ridge", "sequential", "local"])
def test_same_size_equal_widths(
    prune: Callable[[Repair], Checkpoint], tmp_path: Path, restore: Repair
) -> None:
    source = prune(restore)
    assert len(set(intermediate_sizes(source.config))) > 1
    report = export_checkpoint(source, "uniform", tmp_path / "uniform")
    assert report.layout == "LlamaForCausalLM, 3 blocks of 48 channels"
    assert "evaluate it" in report.notes[0]
    assert len(report.notes) == (2 if restore == "local" else 1), report.notes
    copy = Checkpoint(tmp_path / "uniform")
    assert intermediate_sizes(copy.config) == [48, 48, 48]
    assert parameter_count(copy) == parameter_count(source)
    AutoModelForCausalLM.from_pretrained(tmp_path / "uniform")  # no remote code

    manifest = json.loads((tmp_path / "uniform" / "cfsp.json").read_text())
    assert manifest["out"] == str(tmp_path / "uniform")
    assert manifest["criterion"]["block_metric"] == "uniform"
    assert bool(manifest["restoration"]) is (restore != "none")
    before, after = (
        PruningPlan.load(tmp_path / name / "cfsp_plan.json") for name in ("pruned", "uniform")
    )
    for old, new in zip(before.blocks, after.blocks, strict=True):
        # The same scores rank the channels: the smaller choice lies within the larger.
        smaller, larger = sorted((set(old.kept), set(new.kept)), key=len)
        assert smaller <= larger


def test_equal_widths_are_only_copied(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    source = Checkpoint(tiny_checkpoint("llama"))
    export_checkpoint(source, "uniform", tmp_path / "uniform")
    copy = Checkpoint(tmp_path / "uniform")
    assert all(torch.equal(copy.read(name), source.read(name)) for name in source.specs)


def test_widths() -> None:
    assert uniform_width([64, 32, 96], 128, 32) == 64
    assert uniform_width([64, 32, 100], 128, 32) == 64
    assert uniform_width([8, 8, 8], 128, 32) == 32
    assert uniform_width([120, 120, 120], 120, 32) == 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("statistics", "carries no statistics.*--block-metric uniform"),
        ("manifest", "was not pruned by cfsp"),
        ("recovered", "were trained after pruning"),
        ("base", "base model of .* is needed to plan again: .*nowhere.* does not exist"),
    ],
)
def test_refusals(
    prune: Callable[[Repair], Checkpoint], tmp_path: Path, change: str, message: str
) -> None:
    source = prune("none")
    manifest = source.directory / "cfsp.json"
    plan = source.directory / "cfsp_plan.json"
    if change == "statistics":
        (source.directory / "cfsp_statistics.safetensors").unlink()
    elif change == "manifest":
        manifest.unlink()
    elif change == "recovered":
        manifest.write_text(manifest.read_text().replace('"prune"', '"recover"', 1))
    else:
        fields = json.loads(plan.read_text())
        fields["model"]["name"] = "./nowhere"
        plan.write_text(json.dumps(fields))
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, "uniform", tmp_path / "uniform")
    assert not (tmp_path / "uniform").exists()

"""Blocks beside removed ones take over what they did, as far as held-out windows confirm it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from cfsp.checkpoint.reading import Checkpoint
from cfsp.pipeline import prune_checkpoint
from cfsp.repair.sequential import blocks_at_gaps
from cfsp.settings import Budget, CalibrationText, Compute, PruneSettings


def test_blocks_at_gaps() -> None:
    assert blocks_at_gaps(6, ()) == []
    assert blocks_at_gaps(6, (2, 3)) == [1]
    assert blocks_at_gaps(6, (1, 4, 5)) == [0, 2]
    # Where the first blocks go, the first that stays.
    assert blocks_at_gaps(6, (0, 1)) == [0]
    assert blocks_at_gaps(6, (0, 2)) == [0]


@pytest.fixture(scope="module")
def asked(text_file: Path) -> dict[str, Any]:
    return {
        "parts": "blocks", "sparsity": 0.34, "data": [text_file], "samples": 12, "seqlen": 64,
        "device": "cpu", "removal": "influence",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_fit_is_kept_only_where_it_helps(
    tiny_checkpoint: Callable[[str], Path], asked: dict[str, Any], tmp_path: Path, name: str
) -> None:
    source = tiny_checkpoint(name)
    plain = cfsp.prune(source, out=tmp_path / "plain", repair="none", **asked)
    fitted = cfsp.prune(source, out=tmp_path / "fitted", **asked)
    assert fitted.plan == plain.plan
    (step,) = fitted.repair["steps"]
    assert step["name"] == "gaps"
    (index,) = [i for i, entry in enumerate(step["blocks"]) if entry is not None]
    entry = step["blocks"][index]
    (removed,) = fitted.plan.removed_blocks
    assert index == (removed - 1 if removed else 1)
    assert entry["loss_after"] <= entry["loss_before"]
    assert entry["kept"] is (entry["loss_after"] < entry["loss_before"])
    before, after = (cfsp.load(tmp_path / place).state_dict() for place in ("plain", "fitted"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    architecture = Checkpoint(tmp_path / "fitted").architecture
    unit = architecture.units[index - (removed < index)]
    assert changed == [architecture.block_prefix(unit.block) + unit.down] * entry["kept"]


def test_local_repair_handles_gaps_itself(
    tiny_checkpoint: Callable[[str], Path], asked: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    gaps = cfsp.prune(source, out=tmp_path / "gaps", **asked)
    report = cfsp.prune(source, out=tmp_path / "out", repair="local", local_steps=2, **asked)
    step, trained = report.repair["steps"]
    assert (step["name"], trained["name"]) == ("sequential", "local")
    (removed,) = report.plan.removed_blocks
    assert [entry is None for entry in step["blocks"]] == [i == removed for i in range(3)]
    if removed:  # before the gap both streams are the same, so there is nothing to fit
        assert step["blocks"][removed - 1] == gaps.repair["steps"][0]["blocks"][removed - 1]
    assert Checkpoint(tmp_path / "out").architecture.block_count == 2


def test_a_plan_with_blocks_is_repaired_as_in_one_run(
    tiny_checkpoint: Callable[[str], Path], asked: dict[str, Any], tmp_path: Path
) -> None:
    source = tiny_checkpoint("llama")
    report = cfsp.prune(source, out=tmp_path / "once", **asked)
    text = CalibrationText((str(asked["data"][0]),), samples=12, seqlen=64)
    settings = PruneSettings(Budget(0.0), text=text, compute=Compute("cpu"))
    prune_checkpoint(Checkpoint(source), tmp_path / "obeyed", settings, plan=report.plan)
    first, second = (cfsp.load(tmp_path / place).state_dict() for place in ("once", "obeyed"))
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key

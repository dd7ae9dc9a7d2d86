"""A pruned directory as loaders see it that read every weight file they find in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import cfsp
from cfsp.checkpoint.own_files import STATISTICS_FILE
from cfsp.cli import main

# What one or the other loader takes for weights.
WEIGHTS = ("safetensors", "bin", "pt", "pth", "npz", "gguf", "h5", "msgpack", "ckpt")


def test_every_weight_file_holds_tensors_of_the_model_only(pruned: Path) -> None:
    files = [path for ending in WEIGHTS for path in pruned.rglob(f"*.{ending}")]
    assert {path.suffix for path in files} == {".safetensors"}
    found: dict[str, torch.Tensor] = {}
    for path in files:
        found.update(load_file(path))
    model = cfsp.load(pruned)
    assert set(found) == set(model.state_dict()) - set(model.all_tied_weights_keys)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in found.items())


def test_statistics_travel_under_an_ending_of_their_own(
    pruned: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    asked = ["--sparsity", "0.5", "--multiple", "4", "--out", str(plan)]
    statistics = ["--statistics", str(pruned / STATISTICS_FILE)]
    assert main(["plan", str(tiny_checkpoint("llama")), *statistics, *asked]) == 0
    assert plan.is_file()


def test_verify_names_a_file_that_a_loader_would_take_for_weights(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(pruned, copy)
    save_file({"blocks.0.sum": torch.zeros(1)}, copy / "more.safetensors")
    assert main(["verify", str(copy)]) == 2
    assert "more.safetensors is not in cfsp.json" in capsys.readouterr().err

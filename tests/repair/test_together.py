"""Several processes prune together: what one gives, and no half result if one dies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.cli import main
from commands import Command, Commands, ranks


@pytest.fixture(scope="module")
def argv(tiny_checkpoint: Callable[[str], Path], text_file: Path) -> list[str]:
    text = ["--data", str(text_file), "--samples", "18", "--seqlen", "32", "--batch-windows", "2"]
    budget = ["--sparsity", "0.4", "--multiple", "1", "--dtype", "float32"]
    return ["prune", str(tiny_checkpoint("llama")), *text, *budget]


@pytest.mark.parametrize(("repair", "size"), [("ridge", 2), ("sequential", 3)])
def test_many_processes_give_what_one_gives(
    commands: Commands,
    argv: list[str],
    text_file: Path,
    tmp_path: Path,
    repair: str,
    size: int,
) -> None:
    argv = [*argv, "--repair", repair, "--eval", str(text_file), "--eval-windows", "5"]
    one, many = tmp_path / "one", tmp_path / "many"
    ended = commands(
        *(Command([*argv, "--out", str(many)], environment=rank) for rank in ranks(size))
    )
    assert [each.status for each in ended] == [0] * size, ended
    assert [bool(each.stdout) for each in ended] == [True] + [False] * (size - 1)
    assert {path.name for path in tmp_path.iterdir()} == {"many"}
    assert main([*argv, "--out", str(one)]) == 0
    assert (one / PLAN_FILE).read_bytes() == (many / PLAN_FILE).read_bytes()
    expected, found = (load_file(path / "model.safetensors") for path in (one, many))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        difference = torch.linalg.vector_norm(found[name] - tensor)
        assert difference <= 1e-6 * torch.linalg.vector_norm(tensor), name

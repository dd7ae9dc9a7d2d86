"""What a prune will take is told before it starts, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main
from tiny_models import BLOCKS, WIDTH

Estimate = Callable[..., dict[str, Any]]


@pytest.fixture
def argv(tiny_checkpoint: Callable[[str], Path], text_file: Path) -> list[str]:
    text = ["--data", str(text_file), "--samples", "16", "--seqlen", "32", "--dtype", "float32"]
    model = str(tiny_checkpoint("llama"))
    return ["prune", model, *text, "--estimate"]


@pytest.fixture
def estimate(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Estimate:
    def run(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*argv, "--sparsity", "0.5", "--json", *options]) == 0
        assert not list(tmp_path.iterdir())
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_every_stage_of_a_repair_is_in_it(estimate: Estimate) -> None:
    found = estimate("--repair", "sequential", "--block-metric", "angular")
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["coarse pass", "ridge", "solve", "sequential", "solve again", "cut"]
    # The coarse pass has half of the windows, and no Gram matrices.
    gram = 1.25 * WIDTH**2 * BLOCKS * 16 * 32
    assert stages["ridge"]["flop"] == pytest.approx(2 * stages["coarse pass"]["flop"] + gram)
    assert found["flop"] == sum(stage["flop"] for stage in stages.values())
    assert found["measured_tokens"] == 16 * 32
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in stages.values()), abs=0.5)
    assert 5e8 < found["memory_bytes"] < 6e8


def test_more_repair_takes_more(estimate: Estimate) -> None:
    fast, standard = estimate("--repair", "none"), estimate("--repair", "ridge")
    for name in ("flop", "read_bytes", "memory_bytes", "disk_bytes"):
        assert fast[name] < standard[name]
    assert [stage["name"] for stage in fast["stages"]] == ["calibrate", "cut"]
    assert "sensitivity" in [stage["name"] for stage in standard["stages"]]


def test_people_read_a_table(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--sparsity", "0.5", "--out", str(tmp_path / "new" / "out")]) == 0
    text = capsys.readouterr().out
    assert "together" in text
    assert "memory " in text
    assert "available" in text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sparsity", "0.5", "--effort", "best"], "--effort best"),
        (["--sparsity", "0.5", "--dry-run"], "--dry-run"),
        (["--target-params", "0.8"], "--target-params"),
    ],
)
def test_what_has_no_cost_beforehand_is_refused(
    argv: list[str], options: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, *options]) == 2
    assert f"--estimate does not know what {named} takes" in capsys.readouterr().err

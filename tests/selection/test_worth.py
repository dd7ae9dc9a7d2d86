"""What is said before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.selection import worth
from cfsp.settings import Budget, CalibrationText, PruneSettings, TargetKVCache, TargetParameters


def settings(samples: int = 64, sparsity: float = 0.5) -> PruneSettings:
    text = CalibrationText(names=("mixed",), samples=samples)
    return PruneSettings(text=text, budget=Budget(sparsity=sparsity))


@pytest.fixture
def source(tiny_checkpoint: Callable[[str], Path]) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("llama"))


def test_the_size_is_that_of_the_result(
    source: Checkpoint, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    argv = f"prune {source.directory} --sparsity 0.5 --set multiple=1 --out {out} --effort fast"
    assert main([*argv.split(), "--data", str(text_file), "--samples", "2", "--seqlen", "16"]) == 0
    after = json.loads((out / "cfsp.json").read_text())["parameters_after"]
    expected = worth.size_after(source, settings())
    assert expected is not None
    assert abs(after - expected[0]) < 0.01 * after
    assert expected[1] == pytest.approx(4 * expected[0], rel=1e-3)  # float32


def test_a_goal_says_its_size_or_nothing(source: Checkpoint) -> None:
    goal = replace(settings(sparsity=0), goal=TargetParameters(0.75))
    size = worth.size_after(source, goal)
    assert size is not None
    assert "(-25.0%)" in worth.size_in_words(source, goal)
    cache = replace(settings(sparsity=0), goal=TargetKVCache(0.5))
    assert worth.size_after(source, cache) is None
    assert worth.size_in_words(source, cache) == ""


def test_doubts(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own reason; a large model with enough text gives none."""
    small = "has little to spare"
    assert [small in each for each in worth.doubts(source, settings())] == [True]
    monkeypatch.setattr(worth, "_SMALL", 0)
    assert not list(worth.doubts(source, settings()))
    (few,) = worth.doubts(source, settings(samples=63))
    assert few.startswith("63 windows")
    monkeypatch.setattr(worth, "_LITTLE", 1.0)  # as if most were in the vocabulary
    (little,) = worth.doubts(source, settings())
    assert "quantise it" in little

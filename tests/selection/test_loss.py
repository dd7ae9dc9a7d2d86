"""As much goes as keeps the loss within a bound."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from cfsp.cli import main
from cfsp.result.manifest import read_manifest
from cfsp.selection import loss
from cfsp.selection.constraint import STEPS
from cfsp.settings import (
    MaxLossIncrease,
)
from commands_of_goals import prune
from drawn_windows import draw_windows, windows_left_over
from tiny_models import BLOCKS, WIDTH, build_tiny_model


@pytest.fixture(scope="module")
def trained(tokenizer: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt something: of a random one the loss may fall by pruning."""
    windows = draw_windows([str(text_file)], tokenizer, samples=64, seqlen=32, seed=9)
    network = build_tiny_model("llama").train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(60):
        batch_BT = windows.tokens_NT[step % 4 :: 4]
        network(batch_BT, labels=batch_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("trained")
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "HELD_OUT_WINDOWS", 4)


def test_max_loss_increase_prunes_as_much_as_fits(
    trained: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    goal = ("--max-loss-increase", 0.2)
    capsys.readouterr()
    assert prune(trained, text_file, out, *goal, "--repair", "none", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    resolution = report["goal"]
    assert resolution == read_manifest(out)["goal"]  # type: ignore[index]
    fitting = [entry["sparsity"] for entry in resolution["tried"] if entry["fits"]]
    others = [entry["sparsity"] for entry in resolution["tried"] if not entry["fits"]]
    chosen = resolution["chosen"]["sparsity"]
    assert 0 < chosen == max(fitting) == pytest.approx(min(others) - 1 / STEPS)
    assert all((entry["value"] <= 0.2) == entry["fits"] for entry in resolution["tried"])
    # What was tried with masked channels is what came out.
    (tried,) = [entry for entry in resolution["tried"] if entry["sparsity"] == chosen]
    assert resolution["result"] == pytest.approx(tried["value"], abs=1e-4)
    assert tried["parameters"] == report["parameters_after"]
    assert report["ffn_sparsity"] == pytest.approx(chosen, abs=8 / WIDTH / BLOCKS)
    page = tmp_path / "report.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert f"--max-loss-increase 0.2, {len(resolution['tried'])} plans tried" in page.read_text()
    card = (out / "README.md").read_text()
    assert f"| {chosen:.1%} | {report['parameters_after'] / 1000:.1f}k |" in card


def test_max_loss_increase_prints_what_it_tried(
    trained: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    goal = ("--max-loss-increase", 0.2, "--repair", "ridge")
    assert prune(trained, text_file, tmp_path / "out", *goal) == 0
    out = capsys.readouterr().out
    assert "sparsity  parameters  loss increase  fits" in out
    assert "at most 0.2 nats per token over" in out
    assert "(the result: " in out
    assert "repaired by least squares" in out


def test_loss_of_a_model_in_memory(trained: Path, tokenizer: Any, text_file: Path) -> None:
    dense = cfsp.load(trained)
    small = cfsp.prune(
        dense,
        tokenizer,
        goal=MaxLossIncrease(0.2),
        multiple=8,
        data=[text_file],
        samples=8,
        seqlen=32,
        repair="none",
    )
    widths = [layer.mlp.down_proj.in_features for layer in small.model.layers]
    assert 8 * BLOCKS < sum(widths) < WIDTH * BLOCKS
    windows = windows_left_over([str(text_file)], tokenizer, samples=8, seqlen=32, seed=0, count=4)
    with torch.inference_mode():
        found = {
            name: model(windows.tokens_NT, labels=windows.tokens_NT).loss.item()
            for name, model in {"dense": dense, "small": small}.items()
        }
    assert found["small"] - found["dense"] <= 0.2 + 1e-4


def test_a_bound_that_nothing_keeps(
    model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "masked_loss", lambda *_: 50.0)
    goal = ("--max-loss-increase", 0.1)
    assert prune(model, text_file, tmp_path / "out", *goal) == 2
    error = capsys.readouterr().err
    assert "cannot stay within 0.1 nats" in error
    assert "already 0.5% of the FFN channels cost 4" in error
    assert not list(tmp_path.iterdir())


def test_a_loss_is_bounded_for_experts_too(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    goal = ("--max-loss-increase", 0.5)
    assert prune(tiny_checkpoint("mixtral"), text_file, out, *goal) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    chosen = [entry for entry in manifest["goal"]["tried"] if entry["fits"]]
    assert max(entry["sparsity"] for entry in chosen) == manifest["goal"]["chosen"]["sparsity"] > 0
    # The result is repaired; the bound held before.
    assert manifest["goal"]["result"] < 0.5

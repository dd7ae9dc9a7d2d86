"""What a prune will take is told before it starts, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cfsp.cli import main
from tiny_models import BLOCKS, TINY_CONFIGS, WIDTH

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
    found = estimate("--block-metric", "angular")
    stages = {stage["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["coarse pass", "ridge", "solve", "cut"]
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


@pytest.fixture(scope="module")
def wordy(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model of which nearly all is vocabulary."""
    directory = tmp_path_factory.mktemp("wordy")
    config = TINY_CONFIGS["llama"]()
    config.vocab_size = 40_000
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_large_vocabulary_is_in_it(wordy: Path, argv: list[str], estimate: Estimate) -> None:
    small = estimate()
    argv[1] = str(wordy)
    large = estimate()
    # Of 64 positions of a window: logits, probabilities and what is between; and the tokenizer.
    weights, vocabulary = 2 * 40_000 * 32 * 4, 40_000 - 320
    more = large["memory_bytes"] - small["memory_bytes"]
    assert more > weights + vocabulary * (64 * 4 * 3 + 700)

    def sensitivity(found: dict[str, Any]) -> float:
        (flop,) = [stage["flop"] for stage in found["stages"] if stage["name"] == "sensitivity"]
        return float(flop)

    # The head sees every fourth position of 8 windows of 32 tokens, of 1 + 3 passes.
    head = 2 * vocabulary * 32 * 8 * 8 * 4
    assert sensitivity(large) - sensitivity(small) == pytest.approx(head, rel=0.2)


def test_what_is_left_is_told_and_that_it_is_much(
    wordy: Path,
    argv: list[str],
    estimate: Estimate,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv[1] = str(wordy)
    found = estimate()
    assert main([*argv, "--sparsity", "0.5"]) == 0
    told = capsys.readouterr()
    sentence = "50% of the FFN channels are 0.5% of this model's parameters (0.0M of 2.6M)"
    assert sentence in told.err and "give --target-params 0.5" in told.err
    assert "(-0.5%)" in told.out and "of weights" in told.out
    run = [*argv[:-1], "--sparsity", "0.5", "--effort", "fast", "--out", str(tmp_path / "out")]
    assert main([*run, "--json"]) == 0
    printed = capsys.readouterr()
    assert sentence in printed.err
    report = json.loads(printed.out)
    assert found["parameters_before"] == report["parameters_before"]
    assert found["parameters_after"] == pytest.approx(report["parameters_after"], rel=1e-3)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found["bytes_after"] == pytest.approx(weights, rel=0.01)


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

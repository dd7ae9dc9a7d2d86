"""What a prune will take is told before it starts, and nothing is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.cli import main
from cfsp.pruning_cost import Rates
from tiny_models import TINY_CONFIGS

Estimate = Callable[..., dict[str, Any]]


@pytest.fixture
def argv(tiny_checkpoint, text_file) -> list[str]:
    text = ["--data", str(text_file), "--samples", "16", "--seqlen", "32", "--dtype", "float32"]
    model = str(tiny_checkpoint("llama"))
    return ["prune", model, *text, "--estimate"]


@pytest.fixture
def estimate(argv, tmp_path, capsys) -> Estimate:
    def run(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*argv, "--sparsity", "0.5", "--json", *options]) == 0
        assert not list(tmp_path.iterdir())
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


@pytest.fixture
def rates(monkeypatch) -> Rates:
    """A machine that takes 1 s for a token through all blocks, and nearly nothing to read."""
    found = Rates(forward=1.0, gram=0.5, read=1e-9, solve=1e-9)
    monkeypatch.setattr("cfsp.pruning_cost.measured", lambda _: found)
    return found


def seconds(found: dict[str, Any]) -> dict[str, float]:
    return {stage["name"]: stage["seconds"] for stage in found["stages"]}


def test_every_stage_of_a_repair_is_in_it(estimate):
    found = estimate("--block-metric", "angular")
    stages = seconds(found)
    assert list(stages) == ["coarse pass", "ridge", "solve", "cut"]
    assert found["measured_tokens"] == 16 * 32
    assert found["seconds"] == pytest.approx(sum(stages.values()), abs=0.5)
    assert 5e8 < found["memory_bytes"] < 6e8


@pytest.mark.usefixtures("rates")
def test_time_is_in_proportion_to_tokens(estimate):
    stages = seconds(estimate("--block-metric", "angular"))
    # The coarse pass has half of the windows, and no Gram matrices.
    assert [stages[name] for name in ("coarse pass", "ridge")] == [8 * 32, 1.5 * 16 * 32]


@pytest.mark.usefixtures("rates")
def test_more_repair_takes_more(estimate):
    fast, standard = estimate("--repair", "none"), estimate("--repair", "ridge")
    for name in ("seconds", "memory_bytes", "disk_bytes"):
        assert fast[name] < standard[name]
    assert list(seconds(fast)) == ["calibrate", "cut"]
    assert "sensitivity" in seconds(standard)


@pytest.fixture(scope="module")
def wordy(tmp_path_factory, tokenizer) -> Path:
    """A model of which nearly all is vocabulary."""
    directory = tmp_path_factory.mktemp("wordy")
    config = TINY_CONFIGS["llama"]()
    config.vocab_size = 40_000
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.usefixtures("rates")
def test_a_large_vocabulary_is_in_it(wordy, argv, estimate):
    small = estimate()
    argv[1] = str(wordy)
    large = estimate()
    # Of 64 positions of a window: logits, probabilities and what is between; and the tokenizer.
    weights, vocabulary = 2 * 40_000 * 32 * 4, 40_000 - 320
    more = large["memory_bytes"] - small["memory_bytes"]
    assert more > weights + vocabulary * (64 * 4 * 3 + 700)

    # The head sees every fourth position of 8 windows of 32 tokens, of 1 + 3 passes.
    source = open_checkpoint(argv[1])
    blocks = sum(spec.elements for name, spec in source.specs.items() if "layers" in name)
    head = vocabulary * 32 / blocks * 8 * 8 * 4
    rise = seconds(large)["sensitivity"] - seconds(small)["sensitivity"]
    assert rise == pytest.approx(head, rel=1e-3)


def test_what_is_left_is_told_and_that_it_is_much(wordy, argv, estimate, tmp_path, command):
    argv[1] = str(wordy)
    found = estimate()
    told = command(*argv, "--sparsity", "0.5", "--out", tmp_path / "new" / "out")
    assert "together" in told.out and "memory " in told.out and "available" in told.out
    sentence = "50% of the FFN channels are 0.5% of this model's parameters (0.0M of 2.6M)"
    assert sentence in told.err and "give --target-params 0.5" in told.err
    assert "(-0.5%)" in told.out and "of weights" in told.out
    run = [*argv[:-1], "--sparsity", "0.5", "--effort", "fast", "--out", str(tmp_path / "out")]
    printed = command(*run, "--json")
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
def test_what_has_no_cost_beforehand_is_refused(argv, options, named, command):
    assert f"--estimate does not know what {named} takes" in command(*argv, *options, status=2).err

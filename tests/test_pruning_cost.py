"""What a prune will take is told before it starts, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tiny_decoders import tiny_model
from tiny_models import TINY_CONFIGS, build_tiny_model

Estimate = Callable[..., dict[str, Any]]


@pytest.fixture
def argv(model, text_file) -> list[str]:
    text = ["--data", str(text_file), "--samples", "16", "--seqlen", "32", "--dtype", "float32"]
    return ["prune", str(model), *text, "--estimate"]


@pytest.fixture
def estimate(argv, tmp_path, command) -> Estimate:
    def run(*options: str) -> dict[str, Any]:
        told = command(*argv, "--sparsity", 0.5, "--json", *options)
        assert not list(tmp_path.iterdir())
        return json.loads(told.out)

    return run


def test_more_repair_takes_more(estimate):
    fast, standard = estimate("--repair", "none"), estimate("--repair", "ridge")
    for name in ("memory_bytes", "disk_bytes", "flop"):
        assert fast[name] < standard[name]
    assert 5e8 < standard["memory_bytes"] < 6e8
    assert standard["seconds"] > 0


def test_beyond_the_budget_hidden_states_lie_on_disk_once_more(estimate):
    within, beyond = (estimate("--memory-budget", each)["disk_bytes"] for each in ("1GB", "0"))
    assert beyond - within == 16 * 32 * TINY_CONFIGS["llama"]().hidden_size * 4


def test_work_is_that_of_the_formulas(estimate):
    config = TINY_CONFIGS["llama"]()
    hidden, width, blocks = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    key_values = hidden * config.num_key_value_heads // config.num_attention_heads
    weights = 2 * hidden * (hidden + key_values) + 3 * hidden * width + 2 * hidden
    tokens = 16 * 32
    assert estimate("--repair", "none")["flop"] == 2 * weights * blocks * tokens
    kept = width // 2
    solve = 3 * (kept**3 / 3 + 2 * hidden * kept**2)
    per_block = 2 * weights * 1.5 * tokens + 1.25 * width**2 * tokens + solve  # 8 windows first
    found = estimate("--repair", "ridge", "--set", "block_metric=uniform")["flop"]
    assert found == pytest.approx(blocks * per_block)


def test_held_out_windows_are_in_memory(estimate, text_file, other_text_file):
    alike = ("--batch-windows", "1", "--memory-budget", "0", "--set", "block_metric=uniform")
    texts = ("--data", str(text_file), "--data", str(other_text_file))
    for repair, held_out in (("none", 0), ("ridge", 2)):  # of 16 windows; of 32 there are 4
        few, many = (
            estimate("--repair", repair, "--samples", count, *texts, *alike)["memory_bytes"]
            for count in ("16", "32")
        )
        assert many - few == held_out * 32 * TINY_CONFIGS["llama"]().intermediate_size * 4


def test_scores_of_eager_attention_and_values_of_each_token_are_in_memory(
    argv, estimate, save, monkeypatch
):
    alike = ("--repair", "none", "--set", "block_metric=uniform", "--batch-windows", "16")
    scores = 12 * 16 * TINY_CONFIGS["llama"]().num_attention_heads * 32**2
    fused = estimate(*alike)["memory_bytes"]
    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    assert estimate(*alike)["memory_bytes"] - fused == scores
    # Gemma 4 makes a vector of each token for each of its three blocks, here of 16 numbers.
    model = tiny_model("gemma4_text")
    argv[1] = str(save(model))
    few, many = (estimate(*alike, "--seqlen", length)["memory_bytes"] for length in ("16", "32"))
    width, hidden = model.model.layers[0].mlp.down_proj.in_features, model.config.hidden_size
    of_token = 6 * width + 24 * hidden + 4 * hidden + 4 * 3 * 16
    assert many - few == 16 * 16 * of_token


@pytest.fixture(scope="module")
def wordy(save) -> Path:
    """A model of which nearly all is vocabulary."""
    return save(build_tiny_model("llama", vocab_size=40_000))


def test_a_large_vocabulary_is_in_it(wordy, argv, estimate):
    small = estimate()
    argv[1] = str(wordy)
    large = estimate()
    # Of 64 positions of a window: logits, probabilities and what is between; and the tokenizer.
    weights, vocabulary = 2 * 40_000 * 32 * 4, 40_000 - 320
    more = large["memory_bytes"] - small["memory_bytes"]
    assert more > weights + vocabulary * (64 * 4 * 3 + 700)


def test_what_is_left_is_told_and_that_it_is_much(wordy, argv, estimate, tmp_path, command):
    argv[1] = str(wordy)
    found = estimate()
    told = command(*argv, "--sparsity", "0.5", "--out", tmp_path / "new" / "out")
    assert "memory " in told.out and "disk " in told.out and "available" in told.out
    sentence = "50% of the FFN channels are 0.5% of this model's parameters (0.0M of 2.6M)"
    assert sentence in told.err and "give --target-params 0.5" in told.err
    assert "(-0.6%)" in told.out and "of weights" in told.out
    run = [*argv[:-1], "--sparsity", "0.5", "--effort", "fast", "--out", str(tmp_path / "out")]
    printed = command(*run, "--json")
    assert sentence in printed.err
    report = json.loads(printed.out)
    assert found["parameters_before"] == report["parameters_before"]
    assert found["parameters_after"] == report["parameters_after"]
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found["weight_bytes_after"] == pytest.approx(weights, rel=0.01)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sparsity", "0.5", "--effort", "best"], "--effort best"),
        (["--sparsity", "0.5", "--repair", "sequential"], "--repair sequential"),
        (["--sparsity", "0.5", "--dry-run"], "--dry-run"),
        (["--sparsity", "0.5", "--eval", "mixed"], "--eval"),
        (["--target-params", "0.8"], "--target-params"),
        (["--parts", "attention", "--remove", "1"], "--parts attention"),
    ],
)
def test_what_has_no_cost_beforehand_is_refused(argv, options, named, command):
    assert f"--estimate does not know what {named} takes" in command(*argv, *options, status=2).err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sparsity", "0.99"], "cannot remove 99.0% of the FFN channels"),
        (["--parts", "kv", "--sparsity", "0.9"], "cannot remove 90.0% of the KV groups"),
        (["--sparsity", "0.4", "--keep", "99"], "--keep names block 99"),
        (["--sparsity", "0.4", "--samples", "1"], "repair needs at least 2 windows"),
        (["--sparsity", "0.4", "--samples", "1", "--data", "mixed"], "one window for each text"),
        (["--sparsity", "0.4", "--seqlen", "512"], "can read 256 tokens at once"),
        (["--sparsity", "0.4", "--out", "."], "is the current directory"),
    ],
)
def test_what_cannot_be_has_no_cost(argv, more, said, command):
    """What a run refuses before its first pass, whatever its text holds."""
    estimated = command(*argv, *more, status=2).err
    argv.remove("--estimate")
    run = command(*argv, "--out", "never-written", *more, status=2).err
    assert said in estimated
    assert estimated.strip() == run.splitlines()[-1]

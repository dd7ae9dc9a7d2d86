"""A fraction of the KV cache stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from cfsp.result.manifest import read_manifest
from commands import prune
from tiny_models import TINY_CONFIGS


def test_target_kv_cache(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prune(model, text_file, out, "--target-kv-cache", 0.5, "--effort", "fast") == 0
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = manifest["kv_groups"]["before"], manifest["kv_groups"]["after"]
    assert sum(after) <= 0.5 * sum(before) < sum(after) + 1
    assert manifest["goal"]["goal"] == "target_kv_cache"
    assert manifest["ffn_sparsity"] == 0.0
    assert "at most 0.5 of the KV cache" in (out / "README.md").read_text()


def test_a_kv_cache_that_cannot_be_is_refused(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prune(model, text_file, out, "--target-kv-cache", 0.2) == 2
    assert "--target-kv-cache must be at least 0.5, found 0.2" in capsys.readouterr().err
    assert prune(model, text_file, out, "--target-kv-cache", 0.5, "--parts", "ffn") == 0
    assert prune(model, text_file, out, "--target-kv-cache", 0.5, "--parts", "blocks") == 2
    assert "removes KV groups (the default), whole attention layers" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sliding(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which every other block sees no further than 8 tokens back."""
    directory = tmp_path_factory.mktemp("sliding")
    config = TINY_CONFIGS["gemma3_text"]()
    config.num_hidden_layers, kinds = 4, ["sliding_attention", "full_attention"]
    config.layer_types = kinds * 2
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("parts", ["kv", "kv,attention"])
def test_a_sliding_window_caches_no_more_than_its_tokens(
    sliding: Path, text_file: Path, tmp_path: Path, parts: str
) -> None:
    out = tmp_path / "out"
    options = ["--target-kv-cache", 0.77, "--parts", parts, "--effort", "fast"]
    assert prune(sliding, text_file, out, *options) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = (
        sum(n * each for n, each in zip(groups, (8, 256, 8, 256), strict=True))
        for groups in (manifest["kv_groups"]["before"], manifest["kv_groups"]["after"])
    )
    assert before == 1056 and 0.4 * before < after <= 0.77 * before
    assert "at most 0.77 of the KV cache of 256 tokens" in (out / "README.md").read_text()


def test_attentions_that_cache_unequally_are_not_counted(
    sliding: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--target-kv-cache", 0.7, "--parts", "attention")
    assert prune(sliding, text_file, out, *options) == 2
    assert "give --parts kv,attention, found --parts attention" in capsys.readouterr().err


@pytest.mark.parametrize(("parts", "fraction"), [("attention", 0.7), ("kv,attention", 0.5)])
def test_a_kv_cache_without_some_attentions(
    model: Path, text_file: Path, tmp_path: Path, parts: str, fraction: float
) -> None:
    out = tmp_path / "out"
    options = ["--target-kv-cache", fraction, "--parts", parts]
    assert prune(model, text_file, out, *options) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = manifest["kv_groups"]["before"], manifest["kv_groups"]["after"]
    assert sum(after) <= fraction * sum(before) < sum(after) + (2 if parts == "attention" else 1)
    assert manifest["ffn_sparsity"] == 0.0
    if parts == "attention":
        assert {*after} == {0, 2}

"""A model that was pruned in memory and saved by transformers: the directory that cfsp writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

import cfsp
from cfsp.checkpoint.own_files import MODELING_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from tiny_models import build_tiny_model

PLACES = ("memory", "files")
# Of transformers, or of models in memory only.
_THEIRS = {"transformers_version", "dtype", "cfsp", "_name_or_path"}


@pytest.mark.parametrize(
    ("name", "block_metric"), [("llama", "angular"), ("gpt2", "uniform"), ("mixtral", "angular")]
)
def test_save_pretrained_writes_what_prune_writes(
    tiny_checkpoint: Callable[[str], Path],
    tokenizer: Any,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    block_metric: str,
) -> None:
    asked: dict[str, Any] = {
        "sparsity": 0.5, "multiple": 8, "data": [text_file], "samples": 4, "seqlen": 32,
        "repair": "none", "device": "cpu", "block_metric": block_metric,
    }  # fmt: skip
    cfsp.prune(tiny_checkpoint(name), out=tmp_path / "files", **asked)
    model = cfsp.prune(cfsp.load(tiny_checkpoint(name)), tokenizer, **asked)
    model.save_pretrained(tmp_path / "memory")

    config, expected = (
        json.loads((tmp_path / place / "config.json").read_text()) for place in PLACES
    )
    for key in expected.keys() - _THEIRS - {"per_layer_config"}:
        assert config[key] == expected[key], key
    # transformers leaves out the blocks that are as wide as the widest.
    assert ("per_layer_config" in config) is ("per_layer_config" in expected)
    widths = [Checkpoint(tmp_path / place).architecture.widths for place in PLACES]
    assert widths[0] == widths[1]
    assert ("auto_map" in config) is ("auto_map" in expected)
    if "auto_map" in expected:
        assert set(config["auto_map"]) == {"AutoModel", "AutoModelForCausalLM"}
        code = (tmp_path / "files" / MODELING_FILE).read_bytes()
        assert (tmp_path / "memory" / MODELING_FILE).read_bytes() == code
        base = AutoModel.from_pretrained(tmp_path / "memory", trust_remote_code=True)
        assert type(base).__name__.startswith("Pruned")

    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "memory"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["pruned"]
    assert main(["inspect", str(tmp_path / "files"), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)["pruned"]
    for key in known.keys() - {"command", "created"}:
        assert told[key] == known[key], key
    assert main(["inspect", str(tmp_path / "memory")]) == 0
    assert "pruned             50.0% of FFN channels" in capsys.readouterr().out


def test_a_model_that_is_pruned_again_says_nothing_of_the_first_time(
    tiny_checkpoint: Callable[[str], Path], tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "data": [text_file],
        "samples": 4,
        "seqlen": 32,
        "repair": "none",
        "device": "cpu",
        "multiple": 8,
    }
    model = cfsp.prune(cfsp.load(tiny_checkpoint("llama")), tokenizer, sparsity=0.25, **asked)
    model.save_pretrained(tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    cfsp.prune(tmp_path / "first", out=tmp_path / "second", sparsity=0.25, **asked)
    assert "cfsp" not in json.loads((tmp_path / "second" / "config.json").read_text())


def test_a_model_in_training_mode_is_measured_in_evaluation_mode(
    tokenizer: Any, text_file: Path
) -> None:
    asked: dict[str, Any] = {"data": [text_file], "samples": 4, "seqlen": 32, "device": "cpu"}
    model: Any = build_tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    measured = cfsp.calibrate(model, tokenizer, sensitivity=True, **asked)
    pruned = cfsp.prune(model, tokenizer, sparsity=0.5, multiple=8, **asked)

    model.train()
    frozen = model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    again = cfsp.calibrate(model, tokenizer, sensitivity=True, **asked)
    assert again.sensitivity == measured.sensitivity
    same = cfsp.prune(model, tokenizer, sparsity=0.5, multiple=8, **asked)
    assert same.config.to_dict() | {"cfsp": 0} == pruned.config.to_dict() | {"cfsp": 0}
    assert not same.training
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    with pytest.raises(cfsp.CfspError):
        cfsp.prune(model, tokenizer, sparsity=0.5, data=["missing.txt"])
    with pytest.raises(cfsp.CfspError):
        cfsp.prune(model, tokenizer, sparsity=0.99999, **asked)
    assert [module.training for module in model.modules()] == modes

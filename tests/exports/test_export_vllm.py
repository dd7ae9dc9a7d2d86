"""vLLM: the DeciLM layout, as transformers sees it and, where one is named, as vLLM runs it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.registry import export_checkpoint
from cfsp.exports.verification import greedy_after, reference_model
from ragged import WIDTHS, cut, tiny
from tiny_models import build_tiny_model

_RUN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(sys.argv[1], trust_remote_code=True, dtype="float32", enforce_eager=True,
                max_model_len=128, skip_tokenizer_init=True, disable_log_stats=True)
    settings = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": json.loads(sys.argv[2])}
    print("TOKENS", list(model.generate([prompt], settings)[0].outputs[0].token_ids))
"""


@pytest.mark.parametrize("name", ["llama", "llama-biased", "mistral", "qwen2"])
def test_the_described_model_is_the_same(tmp_path: Path, tokenizer: Any, name: str) -> None:
    source = cut(build_tiny_model(name), tokenizer, tmp_path)
    out = tmp_path / "vllm"
    report = export_checkpoint(source, "vllm", out)
    assert report.layout == "DeciLMForCausalLM, 3 blocks of 32 to 96 channels"
    assert report.verification is not None
    assert report.verification.max_difference == 0.0

    copy = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    assert copy == {p.name: p.read_bytes() for p in source.directory.glob("*.safetensors")}


def test_vllm_reads_blocks_as_attributes(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(build_tiny_model("qwen2"), tokenizer, tmp_path)
    export_checkpoint(source, "vllm", tmp_path / "vllm")
    config: Any = AutoConfig.from_pretrained(tmp_path / "vllm", trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    assert config.architectures == ["DeciLMForCausalLM"]
    assert tuple(block.ffn.intermediate_size for block in config.block_configs) == WIDTHS
    for block in config.block_configs:
        assert not block.ffn.no_op
        assert not block.attention.no_op
        assert block.attention.n_heads_in_group == 2
        assert not hasattr(block.ffn, "ffn_mult")  # vLLM would round such a width up
    assert (config.qkv_bias, config.attention_bias, config.mlp_bias) == (True, False, False)
    assert config.sliding_window == 8
    fields, own = (
        json.loads((directory / "config.json").read_text())
        for directory in (tmp_path / "vllm", source.directory)
    )
    assert fields["transformers_version"] == own["transformers_version"]
    assert config.layer_types.count("sliding_attention") == 1
    # It survives what vLLM does with configs: copies, and JSON for its worker processes.
    import copy
    import pickle

    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again.block_configs[1].ffn.intermediate_size == WIDTHS[1]
    assert json.loads(config.to_json_string())["block_configs"][1]["ffn"] == {
        "no_op": False,
        "intermediate_size": WIDTHS[1],
    }


def test_equal_widths_need_no_special_class(
    tmp_path: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    report = export_checkpoint(Checkpoint(tiny_checkpoint("qwen3")), "vllm", tmp_path / "vllm")
    assert report.layout == "Qwen3ForCausalLM"
    assert not list((tmp_path / "vllm").glob("*.py"))


def test_what_is_no_llama_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(build_tiny_model("qwen3"), tokenizer, tmp_path)
    message = "cannot express qwen3; prune with --widths equal .*--model-impl transformers"
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, "vllm", tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()


def test_a_config_that_describes_other_tensors_is_noticed(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cfsp.exports import decilm

    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    written = decilm.decilm_config

    def wrong(checkpoint: Checkpoint) -> dict[str, Any]:
        config = written(checkpoint)
        config["block_configs"][1]["ffn"]["intermediate_size"] = 40
        return config

    monkeypatch.setattr(decilm, "decilm_config", wrong)
    with pytest.raises(ExportError, match="the config describes other tensors"):
        export_checkpoint(source, "vllm", tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()


@pytest.mark.parametrize(
    ("name", "groups"),
    [("llama", None), ("mistral", None), ("qwen2", None), ("llama", (2, 0, 2))],
)
def test_vllm_itself(
    tmp_path: Path, tokenizer: Any, name: str, groups: tuple[int, ...] | None
) -> None:
    """Opt in: CFSP_VLLM_PYTHON names the Python of an environment with vLLM (its CPU build)."""
    python = os.environ.get("CFSP_VLLM_PYTHON")
    if not python:
        pytest.skip("CFSP_VLLM_PYTHON names no Python with vLLM")
    # vLLM's CPU attention wants heads of at least 32.
    model = tiny(name, hidden_size=128, head_dim=32)
    source = cut(model, tokenizer, tmp_path, groups=groups)
    export_checkpoint(source, "vllm", tmp_path / "vllm")
    script = tmp_path / "run.py"
    script.write_text(_RUN_VLLM)
    tokens = [5, 300, 7, 111, 42, 260, 9, 77, 13, 200, 31, 90]
    done = subprocess.run(
        [python, script, tmp_path / "vllm", json.dumps(tokens)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("TOKENS")), None)
    assert line is not None, done.stderr[-3000:]
    found = json.loads(line.removeprefix("TOKENS"))
    with torch.inference_mode():
        assert found == greedy_after(reference_model(source), tokens, found)

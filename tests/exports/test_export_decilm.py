"""One directory for vLLM, SGLang, TensorRT-LLM and mlx-lm: widths, words, refusals.

The readers themselves: mlx-lm where it is installed or `CFSP_MLX_PYTHON` names a Python that has
it; the readers' own rounding where they are installed or `CFSP_READERS` names a folder into
which their wheels are unpacked.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.decilm_readers import (
    MLX_LM,
    READERS,
    SGLANG,
    TENSORRT_LLM,
    VLLM,
    DeciLMModel,
    ffn_mult,
    obstacle,
    width_of,
)
from cfsp.exports.registry import export_checkpoint
from cfsp.exports.verification import greedy_after, reference_model
from cfsp.speed.decilm_footprint import decilm_footprint
from ragged import cut, tiny

FULL = 1024
WIDTHS = (512, 256, 1024)
HIDDEN_SIZES = (32, 576, 768, 896, 960, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 16384)

_SOURCES = {
    "vllm": "vllm/model_executor/models/nemotron_nas.py",
    "sglang": "sglang/srt/models/nemotron_nas.py",
    "tensorrt_llm": "tensorrt_llm/_torch/models/modeling_nemotron_nas.py",
    "mlx_lm": "mlx_lm/models/nemotron-nas.py",
}

_RUN_MLX = """
import json, sys
import mlx.core as mx
from pathlib import Path
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
model, _ = load_model(Path(sys.argv[1]))
widths = [layer.mlp.gate_proj.weight.shape[0] for layer in model.layers]
tokens = json.loads(sys.argv[2])
found = []
for _ in range(16):
    logits = model(mx.array([tokens + found]))
    found.append(int(mx.argmax(logits[0, -1])))
print("FOUND", json.dumps([widths, found]))
"""


def wide(
    name: str,
    tokenizer: Any,
    directory: Path,
    groups: tuple[int, ...] | None = None,
    **changes: Any,
) -> Checkpoint:
    """Return a checkpoint whose widths are multiples of 256, with these KV groups if any."""
    model = tiny(name, intermediate_size=FULL, sliding_window=None, **changes)
    return cut(model, tokenizer, directory, WIDTHS, groups)


def test_every_multiple_of_256_is_exact() -> None:
    for hidden in HIDDEN_SIZES:
        for width in range(256, 65536 + 1, 256):
            multiplier = ffn_mult(width, hidden)
            assert multiplier == round(multiplier, 6)
            # Two thirds, without the fraction, then up to 256 channels.
            channels = int(2 * multiplier * hidden / 3)
            channels += (256 - channels % 256) % 256
            assert channels == width == width_of(multiplier, hidden), (hidden, width)


@pytest.mark.parametrize("package", _SOURCES)
def test_the_readers_own_rounding(package: str) -> None:
    path = _reader_source(package)
    names = ("_ffn_mult_to_intermediate_size", "_find_multiple")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    assert len(tree.body) == 2
    namespace: dict[str, Any] = {}
    exec(compile(tree, str(path), "exec"), namespace)
    for hidden in HIDDEN_SIZES:
        for width in range(256, 32768 + 1, 256):
            assert namespace[names[0]](ffn_mult(width, hidden), hidden) == width, (hidden, width)


@pytest.mark.parametrize("target", ["vllm", "sglang", "tensorrt-llm", "mlx-lm"])
def test_one_directory_for_all(tmp_path: Path, tokenizer: Any, target: str) -> None:
    source = wide("llama", tokenizer, tmp_path)
    report = export_checkpoint(source, target, tmp_path / "out")
    assert report.layout == "DeciLMForCausalLM, 3 blocks of 256 to 1024 channels"
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    assert any(note.startswith("the same directory is for") for note in report.notes)
    assert str(tmp_path / "out") in report.serve

    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    for width, block in zip(WIDTHS, fields["block_configs"], strict=True):
        # mlx-lm knows no other keys; TensorRT-LLM asks for `replace_with_linear`.
        assert set(block["ffn"]) == {"no_op", "replace_with_linear", "ffn_mult"}
        assert set(block["attention"]) == {"no_op", "replace_with_linear", "n_heads_in_group"}
        assert width_of(block["ffn"]["ffn_mult"], 32) == width
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    assert config.block_configs[0].ffn.replace_with_linear is False
    assert config.rope_parameters == source.config.rope_parameters
    assert fields["rope_theta"] == source.config.rope_parameters["rope_theta"]
    assert "rope_scaling" not in fields


def test_scaled_positions_are_said_in_both_words(tmp_path: Path, tokenizer: Any) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    source = wide("llama", tokenizer, tmp_path, rope_parameters=scaling)
    report = export_checkpoint(source, "mlx-lm", tmp_path / "out")
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["rope_scaling"] == scaling
    assert fields["rope_theta"] == 10000.0
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.rope_parameters == source.config.rope_parameters


def test_biases_of_qwen_get_a_zero_where_readers_expect_one(tmp_path: Path, tokenizer: Any) -> None:
    source = wide("qwen2", tokenizer, tmp_path)
    report = export_checkpoint(source, "sglang", tmp_path / "out")
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    added = set(tensors) - set(source.specs)
    assert added == {f"model.layers.{block}.self_attn.o_proj.bias" for block in range(3)}
    assert not any(tensors[name].any() for name in added)
    assert "not for TensorRT-LLM, which reads DeciLM with no biases" in " ".join(report.notes)


@pytest.mark.parametrize(
    ("target", "name", "changes", "message"),
    [
        ("tensorrt-llm", "qwen2", {}, "TensorRT-LLM reads DeciLM with no biases in the attention"),
        ("sglang", "llama-biased", {}, "SGLang reads DeciLM with no biases in the FFN"),
        ("mlx-lm", "llama", {"head_dim": 16}, "mlx-lm reads DeciLM with heads that are together"),
        ("sglang", "llama", {"hidden_act": "gelu"}, "the activation silu only, .* has gelu"),
        (
            "mlx-lm",
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "mlx-lm reads DeciLM with no positions of type dynamic",
        ),
        ("mlx-lm", "qwen3", {}, "mlx-lm's DeciLM class is a Llama and cannot express qwen3"),
    ],
)
def test_what_a_reader_cannot_run_is_refused_by_name(
    tmp_path: Path,
    tokenizer: Any,
    target: str,
    name: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    source = wide(name, tokenizer, tmp_path, **changes)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_an_attention_that_is_gone_is_no_op(tmp_path: Path, tokenizer: Any, name: str) -> None:
    source = wide(name, tokenizer, tmp_path, (2, 0, 2))
    report = export_checkpoint(source, "mlx-lm", tmp_path / "out")
    assert report.layout == (
        "DeciLMForCausalLM, 3 blocks of 256 to 1024 channels, 1 without attention"
    )
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [block["attention"] for block in fields["block_configs"]] == [
        {"no_op": gone, "replace_with_linear": False, "n_heads_in_group": None if gone else 2}
        for gone in (False, True, False)
    ]
    assert not any(block["ffn"]["no_op"] for block in fields["block_configs"])
    # Readers build neither of them for such a block.
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [n for n in tensors if "layers.1.self_attn" in n or "layers.1.input_layernorm" in n]
    footprint = decilm_footprint(tmp_path / "out", head=False, itemsize=4)
    assert footprint.work.cache_bytes == 2 * 2 * 2 * 8 * 4


def test_attentions_that_are_all_narrower_are_said_by_the_config(
    tmp_path: Path, tokenizer: Any
) -> None:
    report = export_checkpoint(
        wide("llama", tokenizer, tmp_path, (1, 0, 1)), "sglang", tmp_path / "out"
    )
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    numbers = ("num_attention_heads", "num_key_value_heads", "head_dim")
    assert [fields[key] for key in numbers] == [2, 1, 8]
    assert any("not for mlx-lm, which reads DeciLM with heads" in note for note in report.notes)


@pytest.mark.parametrize(
    ("target", "groups", "message"),
    [
        *(
            (target, (2, 1, 2), "one number of heads for all .* have 1 to 2 KV groups; use --to gg")
            for target in ("vllm", "sglang", "tensorrt-llm", "mlx-lm")
        ),
        ("vllm", (0, 2, 2), "vLLM reads DeciLM with an attention in the first block.*--to gguf$"),
        ("sglang", (0, 2, 2), "SGLang reads DeciLM with an attention in the first block"),
    ],
)
def test_heads_that_a_reader_cannot_have_are_refused(
    tmp_path: Path, tokenizer: Any, target: str, groups: tuple[int, ...], message: str
) -> None:
    source = wide("llama", tokenizer, tmp_path, groups)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["sglang", "tensorrt-llm", "mlx-lm"])
def test_other_widths_are_for_vllm_alone(tmp_path: Path, tokenizer: Any, target: str) -> None:
    source = cut(tiny("llama"), tokenizer, tmp_path)
    message = "multiples of 256 only, and 3 of 3 blocks have others; prune with --set multiple=256"
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    notes = export_checkpoint(source, "vllm", tmp_path / "vllm").notes
    assert sum(note.startswith("not for ") for note in notes) == 3


def test_windows_are_for_vllm_alone() -> None:
    model = DeciLMModel((256,), (2,), "silu", False, False, True, False, "default")
    assert [reader for reader in READERS if obstacle(reader, model) is None] == [VLLM]
    plain = DeciLMModel((256,), (2,), "silu", False, False, False, False, "default")
    able = [reader for reader in READERS if obstacle(reader, plain) is None]
    assert able == [VLLM, SGLANG, TENSORRT_LLM, MLX_LM]


def test_equal_widths_say_positions_in_the_old_words_too(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(tiny("llama"), tokenizer, tmp_path, (64, 64, 64))
    export_checkpoint(source, "mlx-lm", tmp_path / "mlx")
    fields = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"]


@pytest.mark.parametrize(
    ("name", "widths", "groups"),
    [
        ("llama", WIDTHS, None),
        ("qwen2", WIDTHS, None),
        ("llama", (FULL,) * 3, None),
        ("llama", WIDTHS, (2, 0, 2)),
        ("qwen2", WIDTHS, (0, 2, 2)),
    ],
)
def test_mlx_itself(
    tmp_path: Path,
    tokenizer: Any,
    name: str,
    widths: tuple[int, ...],
    groups: tuple[int, ...] | None,
) -> None:
    python = os.environ.get("CFSP_MLX_PYTHON")
    if not python and importlib.util.find_spec("mlx_lm") is None:
        pytest.skip("mlx-lm is not installed and CFSP_MLX_PYTHON names no Python that has it")
    model = tiny(
        name,
        intermediate_size=FULL,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1234.0},
    )
    source = cut(model, tokenizer, tmp_path, widths, groups)
    export_checkpoint(source, "mlx-lm", tmp_path / "out")
    tokens = [5, 300, 7, 111, 42, 260, 9, 77, 13, 200, 31, 90]
    done = subprocess.run(
        [python or sys.executable, "-c", _RUN_MLX, tmp_path / "out", json.dumps(tokens)],
        capture_output=True,
        text=True,
        check=False,
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("FOUND")), None)
    assert line is not None, done.stderr[-3000:]
    found_widths, found = json.loads(line.removeprefix("FOUND"))
    assert tuple(found_widths) == widths
    with torch.inference_mode():
        assert found == greedy_after(reference_model(source), tokens, found)


def _reader_source(package: str) -> Path:
    folders = [Path(name) for name in [os.environ.get("CFSP_READERS")] if name]
    spec = importlib.util.find_spec(package)
    if spec is not None and spec.origin is not None:
        folders.append(Path(spec.origin).parent.parent)
    for folder in folders:
        if (folder / _SOURCES[package]).is_file():
            return folder / _SOURCES[package]
    pytest.skip(f"{package} is not installed and CFSP_READERS names no folder that has it")

"""One directory for vLLM and mlx-lm: widths, words, refusals.

mlx-lm itself runs where it is installed or `CFSP_MLX_PYTHON` names a Python that has it.
"""

from __future__ import annotations

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
from cfsp.exports.decilm import ffn_mult, width_of
from cfsp.exports.registry import export_checkpoint
from cfsp.exports.verification import greedy_after, reference_model
from cfsp.speed.vllm_engine import decilm_footprint
from ragged import cut, tiny

FULL = 1024
WIDTHS = (512, 256, 1024)
HIDDEN_SIZES = (32, 576, 768, 896, 960, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 16384)

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
    model = tiny(name, **{"intermediate_size": FULL, "sliding_window": None, **changes})
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


@pytest.mark.parametrize("target", ["vllm", "mlx-lm"])
def test_one_directory_for_all(tmp_path: Path, tokenizer: Any, target: str) -> None:
    source = wide("llama", tokenizer, tmp_path)
    report = export_checkpoint(source, target, tmp_path / "out")
    assert report.layout == "DeciLMForCausalLM, 3 blocks of 256 to 1024 channels"
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    assert str(tmp_path / "out") in report.serve

    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    for width, block in zip(WIDTHS, fields["block_configs"], strict=True):
        # mlx-lm refuses keys that it does not know.
        assert set(block["ffn"]) == {"no_op", "ffn_mult"}
        assert set(block["attention"]) == {"no_op", "n_heads_in_group"}
        assert width_of(block["ffn"]["ffn_mult"], 32) == width
    config: Any = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
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


def test_biases_of_qwen_get_a_zero_where_mlx_expects_one(tmp_path: Path, tokenizer: Any) -> None:
    source = wide("qwen2", tokenizer, tmp_path)
    report = export_checkpoint(source, "mlx-lm", tmp_path / "out")
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    added = set(tensors) - set(source.specs)
    assert added == {f"model.layers.{block}.self_attn.o_proj.bias" for block in range(3)}
    assert not any(tensors[name].any() for name in added)


@pytest.mark.parametrize(
    ("target", "name", "changes", "message"),
    [
        ("mlx-lm", "mistral", {"sliding_window": 8}, "no sliding window.*use --to vllm or --to gg"),
        ("mlx-lm", "llama", {"head_dim": 16}, "mlx-lm reads DeciLM with heads that are together"),
        ("mlx-lm", "llama", {"hidden_act": "gelu"}, "the activation silu only, .* has gelu"),
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
        {"no_op": gone, "n_heads_in_group": None if gone else 2} for gone in (False, True, False)
    ]
    assert not any(block["ffn"]["no_op"] for block in fields["block_configs"])
    # Readers build neither of them for such a block.
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [n for n in tensors if "layers.1.self_attn" in n or "layers.1.input_layernorm" in n]
    footprint = decilm_footprint(tmp_path / "out", itemsize=4)
    assert footprint.work.cache_bytes == 2 * 2 * 2 * 8 * 4


def test_attentions_that_are_all_narrower_are_said_by_the_config(
    tmp_path: Path, tokenizer: Any
) -> None:
    report = export_checkpoint(
        wide("llama", tokenizer, tmp_path, (1, 0, 1)), "vllm", tmp_path / "out"
    )
    assert report.verification is not None
    assert report.verification.max_difference == 0.0
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    numbers = ("num_attention_heads", "num_key_value_heads", "head_dim")
    assert [fields[key] for key in numbers] == [2, 1, 8]


@pytest.mark.parametrize(
    ("target", "groups", "message"),
    [
        *(
            (target, (2, 1, 2), "one number of heads for all .* have 1 to 2 KV groups; use --to gg")
            for target in ("vllm", "mlx-lm")
        ),
        ("vllm", (0, 2, 2), "vLLM reads DeciLM with an attention in the first block.*--to gguf$"),
    ],
)
def test_heads_that_a_reader_cannot_have_are_refused(
    tmp_path: Path, tokenizer: Any, target: str, groups: tuple[int, ...], message: str
) -> None:
    source = wide("llama", tokenizer, tmp_path, groups)
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_widths_are_for_vllm_alone(tmp_path: Path, tokenizer: Any) -> None:
    source = cut(tiny("llama"), tokenizer, tmp_path)
    message = "multiples of 256 only, and 3 of 3 blocks have others; prune with --set multiple=256"
    with pytest.raises(ExportError, match=message):
        export_checkpoint(source, "mlx-lm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


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

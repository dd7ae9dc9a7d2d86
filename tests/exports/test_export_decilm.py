"""DeciLM's layout for vLLM and mlx-lm: widths, words, refusals; `make serve-check` runs both.

Here a Llama of transformers is built by what the written config says.
"""

import json
import pickle
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

import cfsp
from builders import edit_json, read_json
from cfsp.architecture.resizing import Gone
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.decilm import ffn_mult
from cfsp.exports.registry import ExportReport, export
from ragged import WIDTHS as NARROW
from ragged import cut, tiny
from stock import logits_of
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model

FULL = 1024
WIDTHS = (512, 256, 1024)
HIDDEN_SIZES = (32, 576, 768, 896, 960, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 16384)


def wide(
    name: str, tokenizer: Any, directory: Path, groups: Sequence[int] | None = None, **changes: Any
) -> Checkpoint:
    """Return a checkpoint whose widths are multiples of 256, with these KV groups if any."""
    model = tiny(name, **{"intermediate_size": FULL, "sliding_window": None, **changes})
    return cut(model, tokenizer, directory, WIDTHS, groups)


def exported(source: Checkpoint, target: str, out: Path) -> tuple[ExportReport, dict[str, Any]]:
    """Export, and return the report and the config of a copy that computes the very same."""
    report = export(source.directory, target, out)
    assert report.verification is None
    # They fit into every window, of which this Llama knows nothing.
    models = cfsp.load(source.directory), described(out)
    assert torch.equal(*(logits_of(each, torch.arange(5, 11)[None]) for each in models))
    return report, json.loads((out / "config.json").read_text())


def described(directory: Path) -> PreTrainedModel:
    """Return a Llama with the blocks that a DeciLM config names, filled from its directory."""
    written = json.loads((directory / "config.json").read_text())
    fields = {k: v for k, v in written.items() if k not in ("model_type", "auto_map")}
    fields["attention_bias"] = written["attention_bias"] or written["qkv_bias"]
    config = LlamaConfig(**fields)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    for layer, block in zip(model.model.layers, written["block_configs"], strict=True):
        ffn = block["ffn"]
        by_multiple = width_of(ffn.get("ffn_mult", 0), config.hidden_size)
        config.intermediate_size = ffn.get("intermediate_size", by_multiple)
        layer.mlp = LlamaMLP(config)
        if block["attention"]["no_op"]:
            layer.self_attn, layer.input_layernorm = Gone(1), torch.nn.Identity()
        elif not written["attention_bias"]:
            layer.self_attn.o_proj.register_parameter("bias", None)
    tensors = load_file(directory / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def width_of(ffn_mult: float, hidden: int) -> int:
    """Return the width that readers make of `ffn_mult`."""
    # Two thirds, without the fraction, then up to 256 channels.
    return -(-int(2 * ffn_mult * hidden / 3) // 256) * 256


def test_every_multiple_of_256_is_exact():
    for hidden in HIDDEN_SIZES:
        for width in range(256, 65536 + 1, 256):
            multiplier = ffn_mult(width, hidden)
            assert multiplier == round(multiplier, 6)
            assert width == width_of(multiplier, hidden), (hidden, width)


@pytest.mark.parametrize("target", ["vllm", "mlx-lm"])
def test_one_directory_for_all(tmp_path, tokenizer, target):
    source = wide("llama", tokenizer, tmp_path)
    report, fields = exported(source, target, tmp_path / "out")
    assert report.layout == "DeciLMForCausalLM, 3 blocks of 256 to 1024 channels"
    assert str(tmp_path / "out") in report.serve
    for width, block in zip(WIDTHS, fields["block_configs"], strict=True):
        # mlx-lm refuses keys that it does not know.
        assert set(block["ffn"]) == {"no_op", "ffn_mult"}
        assert set(block["attention"]) == {"no_op", "n_heads_in_group"}
        assert width_of(block["ffn"]["ffn_mult"], 32) == width
    assert fields["rope_parameters"] == source.config.rope_parameters
    assert fields["rope_theta"] == source.config.rope_parameters["rope_theta"]
    assert "rope_scaling" not in fields
    # mlx-lm, which needs none, would ask whether to run the code.
    has_code = (tmp_path / "out" / "configuration_decilm.py").is_file()
    assert has_code is ("auto_map" in fields) is (target == "vllm")


def test_scaled_positions_are_said_in_both_words(tmp_path, tokenizer):
    scaling = {"rope_type": "linear", "factor": 2.0}
    source = wide("llama", tokenizer, tmp_path, rope_parameters=scaling)
    _, fields = exported(source, "mlx-lm", tmp_path / "out")
    assert fields["rope_scaling"] == scaling
    assert fields["rope_theta"] == 10000.0
    assert fields["rope_parameters"] == source.config.rope_parameters


@pytest.mark.parametrize(
    ("name", "is_wide"), [("llama", True), ("llama", False), ("internvl", False)]
)
def test_a_head_of_its_own_is_not_said_to_be_tied(tmp_path, tokenizer, name, is_wide):
    """As merging a LoRA of the head leaves it; transformers takes what is stored."""
    if is_wide:
        source = wide(name, tokenizer, tmp_path, tie_word_embeddings=True)
    else:
        model = tiny_model(name)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = True
        model.tie_weights()
        equal = None if name == "llama" else [32] * model.config.get_text_config().num_hidden_layers
        source = cut(model, tokenizer, tmp_path, equal)
    before = "language_model." if name == "internvl" else ""  # as those that read images store it
    weights = source.directory / "model.safetensors"
    for factor, tied in ((1.0, True), (2.0, False)):
        stored = load_file(weights)
        head = factor * stored[f"{before}model.embed_tokens.weight"]
        save_file({**stored, f"{before}lm_head.weight": head}, weights, metadata={"format": "pt"})
        out = tmp_path / f"out-{tied}"
        export(source.directory, "vllm", out)
        fields = json.loads((out / "config.json").read_text())
        for part in (fields, fields.get("text_config", fields)):
            assert part["tie_word_embeddings"] is tied


def test_biases_of_qwen_get_a_zero_where_mlx_expects_one(tmp_path, tokenizer):
    source = wide("qwen2", tokenizer, tmp_path)
    exported(source, "mlx-lm", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    added = set(tensors) - set(source.specs)
    assert added == {f"model.layers.{block}.self_attn.o_proj.bias" for block in range(3)}
    assert not any(tensors[name].any() for name in added)


_HEADS = "one number of heads for all .* have 1 to 2 KV groups; use --to gguf$"


@pytest.mark.parametrize(
    ("target", "name", "groups", "changes", "message"),
    [
        (
            "mlx-lm", "mistral", None, {"sliding_window": 8},
            "no sliding window.*; use --to gguf or --to openvino or --to vllm$",
        ),
        ("mlx-lm", "llama", None, {"head_dim": 16}, "mlx-lm reads DeciLM with heads that are toge"),
        ("mlx-lm", "llama", None, {"hidden_act": "gelu"}, "the activation silu only, .* has gelu"),
        (
            "mlx-lm", "llama", None, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "mlx-lm reads DeciLM with no positions of type dynamic",
        ),
        (
            "mlx-lm", "qwen3", None, {},
            "a Llama and cannot express qwen3; .* own class, or use --to gguf or --to openvino$",
        ),
        # Nobody is sent where it is refused, too.
        (
            "mlx-lm", "qwen3", None, {"tie_word_embeddings": False},
            "cannot express qwen3; .* own class, or use --to openvino$",
        ),
        (
            "vllm", "qwen3", None, {},
            "cannot express qwen3; prune with --widths equal .*vllm serve '.*/a b/pruned' --trust",
        ),
        ("vllm", "qwen3", (2, 0, 2), {}, "widths equal and without --parts attention for vLLM's"),
        ("vllm", "llama", (2, 1, 2), {}, _HEADS),
        ("mlx-lm", "llama", (2, 1, 2), {}, _HEADS),
        (
            "vllm", "llama", (0, 2, 2), {},
            "vLLM reads DeciLM with an attention in the first block.*--to gguf or --to mlx-lm$",
        ),
    ],
)  # fmt: skip
def test_what_a_reader_cannot_run_is_refused_by_name(
    tmp_path, tokenizer, target, name, groups, changes, message
):
    source = wide(name, tokenizer, tmp_path / "a b", groups, **changes)
    with pytest.raises(ExportError, match=message):
        export(source.directory, target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_stock_copy_names_its_class(tmp_path, tokenizer):
    """A config names that of the base model, or none, and vLLM would run no head, or nothing."""
    source = cut(tiny("qwen2"), tokenizer, tmp_path, (64, 64, 64))
    edit_json(source.directory / "config.json", lambda f: f.update(architectures=["Qwen2Model"]))
    export(source.directory, "vllm", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["architectures"] == ["Qwen2ForCausalLM"]


@pytest.mark.parametrize("target", ["vllm", "mlx-lm"])
def test_a_tensor_of_no_parameter_has_no_place(tmp_path, tokenizer, target):
    source = wide("llama", tokenizer, tmp_path)
    weights = source.directory / "model.safetensors"
    save_file({**load_file(weights), "v_head.summary.weight": torch.ones(1, 32)}, weights)
    with pytest.raises(ExportError, match="no place for the tensor v_head"):
        export(source.directory, target, tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_attention_that_is_gone_is_no_op(tmp_path, tokenizer, name):
    source = wide(name, tokenizer, tmp_path, (2, 0, 2))
    report, fields = exported(source, "mlx-lm", tmp_path / "out")
    assert report.layout.endswith(", 3 blocks of 256 to 1024 channels, 1 without attention")
    assert [block["attention"] for block in fields["block_configs"]] == [
        {"no_op": gone, "n_heads_in_group": None if gone else 2} for gone in (False, True, False)
    ]
    assert not any(block["ffn"]["no_op"] for block in fields["block_configs"])
    # Readers build neither of them for such a block.
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [n for n in tensors if "layers.1.self_attn" in n or "layers.1.input_layernorm" in n]


def test_attentions_that_are_all_narrower_are_said_by_the_config(tmp_path, tokenizer):
    _, fields = exported(wide("llama", tokenizer, tmp_path, (1, 0, 1)), "vllm", tmp_path / "out")
    numbers = ("num_attention_heads", "num_key_value_heads", "head_dim")
    assert [fields[key] for key in numbers] == [2, 1, 8]


def test_heads_of_another_size_than_a_class_takes_are_said(tmp_path, tokenizer):
    """A Qwen2 takes it from the hidden size, which fewer heads do not divide as all did."""
    source = cut(tiny("qwen2"), tokenizer, tmp_path / "qwen2", (64, 64, 64), (1, 1, 1))
    report, fields = exported(source, "vllm", tmp_path / "out")
    assert report.layout.startswith("DeciLM") and fields["head_dim"] == 8
    with pytest.raises(ExportError, match="heads that are together as wide as the hidden state"):
        export(source.directory, "mlx-lm", tmp_path / "mlx")
    source = cut(tiny("llama"), tokenizer, tmp_path / "llama", (64, 64, 64), (1, 1, 1))
    assert "LlamaForCausalLM" in export(source.directory, "mlx-lm", tmp_path / "llama-mlx").layout


def test_other_widths_are_for_vllm_and_equal_ones_for_all(tmp_path, tokenizer):
    message = "multiples of 256 only, and 3 of 3 blocks have others; prune with --set multiple=256"
    with pytest.raises(ExportError, match=message):
        ragged = cut(tiny("llama"), tokenizer, tmp_path / "ragged")
        export(ragged.directory, "mlx-lm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source = cut(tiny("llama"), tokenizer, tmp_path, (64, 64, 64))
    export(source.directory, "mlx-lm", tmp_path / "mlx")
    fields = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    # Positions are said in the old words too.
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"]
    assert not list((tmp_path / "mlx").glob("*.py"))


def test_vllm_reads_blocks_as_attributes(tmp_path, tokenizer):
    source = cut(build_tiny_model("qwen2"), tokenizer, tmp_path)
    report, fields = exported(source, "vllm", tmp_path / "vllm")
    assert report.layout == "DeciLMForCausalLM, 3 blocks of 32 to 96 channels"
    weights = "model.safetensors"
    copy, original = ((at / weights).read_bytes() for at in (tmp_path / "vllm", source.directory))
    assert copy == original
    config: Any = AutoConfig.from_pretrained(tmp_path / "vllm", trust_remote_code=True)
    assert config.model_type == "nemotron-nas"
    assert config.architectures == ["DeciLMForCausalLM"]
    assert tuple(block.ffn.intermediate_size for block in config.block_configs) == NARROW
    for block in config.block_configs:
        assert not block.ffn.no_op
        assert not block.attention.no_op
        assert block.attention.n_heads_in_group == 2
        assert not hasattr(block.ffn, "ffn_mult")  # vLLM would round such a width up
    assert (config.qkv_bias, config.attention_bias, config.mlp_bias) == (True, False, False)
    assert config.sliding_window == 8
    own = json.loads((source.directory / "config.json").read_text())
    assert fields["transformers_version"] == own["transformers_version"]
    assert config.layer_types.count("sliding_attention") == 1
    # It survives what vLLM does with configs: copies, and JSON for its worker processes.
    for again in (deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert again.block_configs[1].ffn.intermediate_size == NARROW[1]
    second = json.loads(config.to_json_string())["block_configs"][1]
    assert second["ffn"] == {"no_op": False, "intermediate_size": NARROW[1]}

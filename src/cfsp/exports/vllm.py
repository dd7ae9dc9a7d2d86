"""Target `vllm`: the layout of vLLM's DeciLM, a Llama whose blocks have widths of their own.

Weights are copied byte for byte. The config names the width of every block in `block_configs`;
vLLM rounds a width that is given as `ffn_mult` up to 256, so it is given as `intermediate_size`.
A small config class beside it makes the blocks readable as attributes, as vLLM wants them.

Without this export vLLM runs the checkpoint itself through its Transformers backend.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.config_widths import modeling_file
from cfsp.checkpoint.loading import compute_dtype
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.shards import write_shards
from cfsp.checkpoint.tensor_file import OutgoingTensor, TensorSpec
from cfsp.checkpoint.writing import copy_travelling_files
from cfsp.errors import ExportError
from cfsp.exports import padded
from cfsp.exports.context import context_limit
from cfsp.exports.target import ExportOptions, Target, Written
from cfsp.exports.verification import (
    Verification,
    compare_logits,
    logits_of,
    probe_lengths,
    probe_tokens,
    reference_model,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE = "configuration_decilm.py"
# The same operations in the same order; float32 rounds the same.
TOLERANCE = 1e-6

_LIKE_LLAMA = ("llama", "mistral", "qwen2")
# What a Llama has and the model's config says in the same words.
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "initializer_range", "pad_token_id",
    "bos_token_id", "eos_token_id", "sliding_window", "layer_types",
)  # fmt: skip


def write(source: Checkpoint, out: Path, options: ExportOptions) -> Written:
    """Write the checkpoint into an existing directory."""
    widths = source.architecture.widths
    if modeling_file(source.config, source.architecture) is None:
        plain = padded.write(source, out, options)
        return Written(plain.layout, ("all blocks are equally wide: the ordinary class runs it",))
    config = decilm_config(source)
    write_shards(out, [_copied(source, name, spec) for name, spec in source.specs.items()])
    copy_travelling_files(source.directory, out)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / CONFIG_FILE).write_text(_config_code(), encoding="utf-8")
    narrow, wide = min(widths), max(widths)
    return Written(
        f"DeciLMForCausalLM, {len(widths)} blocks of {narrow} to {wide} channels",
        ("vLLM loads it with --trust-remote-code, because of its config class",),
    )


def decilm_config(source: Checkpoint) -> dict[str, Any]:
    """Return config.json in DeciLM's terms.

    Raises:
        ExportError: the model is not a Llama in all but its widths.
    """
    config: Any = source.config
    model_type = source.config.model_type
    if model_type not in _LIKE_LLAMA:
        raise ExportError(
            f"vLLM's DeciLM class is a Llama and cannot express {model_type}; use --to padded for "
            "vLLM's own class, or its Transformers backend, which runs the checkpoint itself where "
            f"it can: vllm serve {source.directory} --trust-remote-code --model-impl transformers"
        )
    prefix = source.architecture.block_prefix(0)
    biased = {m: f"{prefix}self_attn.{m}_proj.bias" in source.specs for m in "qkvo"}
    group = config.num_attention_heads // config.num_key_value_heads
    widths = source.architecture.widths
    fields = {key: getattr(config, key) for key in _SHARED if hasattr(config, key)}
    fields = {key: value for key, value in fields.items() if value is not None}
    if fields.get("sliding_window") and "layer_types" not in fields:
        fields["layer_types"] = ["sliding_attention"] * len(widths)
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": f"{CONFIG_FILE.removesuffix('.py')}.DeciLMConfig"},
        "dtype": _dtype(source),
        # Loaders look at it to know how old the words of a config are.
        "transformers_version": _transformers_version(source),
        **fields,
        "intermediate_size": max(widths),
        "attention_bias": biased["o"],
        "qkv_bias": biased["q"],
        "mlp_bias": f"{prefix}mlp.up_proj.bias" in source.specs,
        "block_configs": [
            {
                "attention": {"no_op": False, "n_heads_in_group": group},
                "ffn": {"no_op": False, "intermediate_size": width},
            }
            for width in widths
        ],
    }


def verify(source: Checkpoint, out: Path, options: ExportOptions) -> Verification:
    """Build the model that the written config describes, as vLLM would, and compare logits."""
    if not (out / CONFIG_FILE).is_file():
        return padded.verify(source, out, options)
    # The stock Llama below knows no sliding window, so the probe stays within it.
    tokens = probe_tokens(source, probe_lengths(context_limit(source.config)[0])[0])
    expected_TV = logits_of(reference_model(source), tokens)
    found_TV = logits_of(build_described_model(out), tokens)
    return compare_logits("transformers (vLLM not run)", expected_TV, found_TV, TOLERANCE)


def build_described_model(directory: Path) -> PreTrainedModel:
    """Return a Llama with the blocks that a DeciLM config names, filled from its directory.

    Raises:
        ExportError: the stored tensors are not those that the config describes.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaMLP

    described: Any = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    fields = {k: v for k, v in described.to_dict().items() if k not in ("model_type", "auto_map")}
    fields["attention_bias"] = described.attention_bias or described.qkv_bias
    config = LlamaConfig(**fields)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    for layer, block in zip(model.model.layers, described.block_configs, strict=True):
        config.intermediate_size = block.ffn.intermediate_size
        layer.mlp = LlamaMLP(config)
        if not described.attention_bias:
            layer.self_attn.o_proj.register_parameter("bias", None)
    for path in sorted(directory.glob("*.safetensors")):
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        try:
            unexpected = model.load_state_dict(tensors, strict=False).unexpected_keys
        except RuntimeError as error:
            raise ExportError(f"the config describes other tensors: {error}") from error
        if unexpected:
            raise ExportError(f"the config has no place for {unexpected[0]}; nothing was kept")
    model.tie_weights()
    return model.eval()


def _copied(source: Checkpoint, name: str, spec: TensorSpec) -> OutgoingTensor:
    return OutgoingTensor(name, spec, lambda: source.chunks(name))


def _config_code() -> str:
    return resources.files("cfsp.exports").joinpath("decilm_config_template.txt").read_text()


def _transformers_version(source: Checkpoint) -> str:
    """Return the version that wrote the source's config; ours if that does not say."""
    import transformers

    return str(getattr(source.config, "transformers_version", None) or transformers.__version__)


def _dtype(source: Checkpoint) -> str:
    return str(compute_dtype(source)).removeprefix("torch.")


TARGET = Target("vllm", "", write, verify)

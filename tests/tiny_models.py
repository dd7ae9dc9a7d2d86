"""One tiny random model for every family: a name, and what its config has besides the common.

A name is a model type, or a model type with a variant after a dash. Together they cover grouped and
full attention, tied and untied embeddings, biases in attention and FFN, sliding windows and layers
of different attention types.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tiny_decoders import BLOCKS, VOCABULARY, WIDTH, tiny_config

__all__ = ["BLOCKS", "VOCABULARY", "WIDTH"]  # which tests take from here

# What each has besides the common of `tiny_decoders`.
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "head_dim": 8},
    "llama-biased": {
        "num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True,
        "mlp_bias": True, "head_dim": 8,
    },
    "mistral": {"tie_word_embeddings": False, "sliding_window": 16, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 256},
    "gemma3_text": {"query_pre_attn_scalar": 256},
    "olmo2": {},
    "smollm3": {"no_rope_layer_interval": 2, "sliding_window": None},
    "granite": {
        "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3, "mlp_bias": True,
    },
    "stablelm-parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "phi3": {"num_key_value_heads": 2, "sliding_window": 16},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "qk_layernorm": True},
    "gpt_neox": {"rotary_pct": 0.5, "use_parallel_residual": True},
    "gpt2": {},
    # The width that the config leaves out is four times the hidden size.
    "gpt2-plain": {"n_embd": WIDTH // 4, "n_inner": None},
    "opt": {"do_layer_norm_before": True},
    # Their width is that of an expert; the shared expert of qwen2_moe has another one.
    "mixtral": {"sliding_window": 16, "head_dim": None},
    "qwen2_moe": {
        "intermediate_size": 56, "moe_intermediate_size": WIDTH,
        "shared_expert_intermediate_size": 40, "tie_word_embeddings": True,
    },
    "qwen3_moe": {
        "intermediate_size": 56, "moe_intermediate_size": WIDTH, "num_experts": 6,
        "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 16,
    },
    "opt-projected": {
        "do_layer_norm_before": False, "word_embed_proj_dim": 16, "enable_bias": False,
    },
}  # fmt: skip
TINY_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    name: partial(tiny_config, name.partition("-")[0], **own) for name, own in _OWN.items()
}


# Those whose blocks have one FFN.
DENSE_CONFIGS = {
    name: config
    for name, config in TINY_CONFIGS.items()
    if name.split("-")[0] not in ("mixtral", "qwen2_moe", "qwen3_moe")
}


def dense_configs(*some: str) -> tuple[str, ...]:
    """Return these, of each kind one; all where time does not matter: `make families` says so."""
    return tuple(sorted(DENSE_CONFIGS)) if "CFSP_EVERY_FAMILY" in os.environ else some


def build_tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """Return a tiny random model, with some settings of its config changed.

    Also norms and biases are random, so that none hides.
    """
    config = TINY_CONFIGS[name]()
    if changes:
        rope = changes.get("rope_parameters")
        if rope is not None and "full_attention" not in rope:
            changes["rope_parameters"] = {"rope_theta": 10000.0, **rope}
        config = type(config)(**{**config.to_dict(), "layer_types": None, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()

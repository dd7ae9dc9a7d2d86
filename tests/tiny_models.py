"""One tiny random model for every family: a name and a config factory.

A new family needs one entry here. A name is a model type, or a model type with a variant after
a dash. Together they cover grouped and full attention, tied and untied embeddings, biases in
attention and FFN, sliding windows and layers of different attention types.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

BLOCKS = 3
WIDTH = 96
VOCABULARY = 320

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    # Larger than the usual 0.02: a tiny model then computes something worth comparing.
    "initializer_range": 0.2,
}

# Their own padding tokens lie outside the tiny vocabulary.
_NO_PADDING: dict[str, Any] = {"pad_token_id": None}

_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}

_OPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "ffn_dim": WIDTH,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "init_std": 0.2,
}


TINY_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON, tie_word_embeddings=False),
    "llama-biased": lambda: LlamaConfig(
        **{**_COMMON, "num_key_value_heads": 4},
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral": lambda: MistralConfig(**_COMMON, tie_word_embeddings=False, sliding_window=16),
    "qwen2": lambda: Qwen2Config(
        **_COMMON,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    ),
    "qwen3": lambda: Qwen3Config(**_COMMON, tie_word_embeddings=True, head_dim=16),
    "gemma": lambda: GemmaConfig(**_COMMON, **_NO_PADDING, head_dim=16),
    "gemma2": lambda: Gemma2Config(**_COMMON, **_NO_PADDING, head_dim=16, sliding_window=8),
    "gemma3_text": lambda: Gemma3TextConfig(
        **_COMMON,
        **_NO_PADDING,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "olmo2": lambda: Olmo2Config(**_COMMON, **_NO_PADDING),
    "smollm3": lambda: SmolLM3Config(**_COMMON, **_NO_PADDING, no_rope_layer_interval=2),
    "granite": lambda: GraniteConfig(
        **_COMMON,
        embedding_multiplier=3.0,
        logits_scaling=2.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        mlp_bias=True,
    ),
    "stablelm": lambda: StableLmConfig(**_COMMON, use_qkv_bias=True, partial_rotary_factor=0.5),
    "stablelm-parallel": lambda: StableLmConfig(
        **_COMMON, use_parallel_residual=True, qk_layernorm=True
    ),
    "phi3": lambda: Phi3Config(
        **_COMMON, **_NO_PADDING, original_max_position_embeddings=256, sliding_window=16
    ),
    "starcoder2": lambda: Starcoder2Config(**_COMMON, use_bias=True, sliding_window=16),
    "phi": lambda: PhiConfig(
        **{**_COMMON, "num_key_value_heads": 4}, partial_rotary_factor=0.5, qk_layernorm=True
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, rotary_pct=0.5, use_parallel_residual=True),
    "gpt_neox-serial": lambda: GPTNeoXConfig(
        **_COMMON, use_parallel_residual=False, attention_bias=False
    ),
    "gpt2": lambda: GPT2Config(**_GPT2, n_inner=WIDTH),
    # The width that the config leaves out is four times the hidden size.
    "gpt2-plain": lambda: GPT2Config(**{**_GPT2, "n_embd": WIDTH // 4}),
    "opt": lambda: OPTConfig(**_OPT, do_layer_norm_before=True),
    # Their width is that of an expert; the shared expert of qwen2_moe has another one.
    "mixtral": lambda: MixtralConfig(
        **_COMMON, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **{**_COMMON, "intermediate_size": 56},
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **{**_COMMON, "intermediate_size": 56},
        moe_intermediate_size=WIDTH,
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        head_dim=16,
    ),
    "opt-projected": lambda: OPTConfig(
        **_OPT, do_layer_norm_before=False, word_embed_proj_dim=16, enable_bias=False
    ),
}


# Those whose blocks have one FFN.
DENSE_CONFIGS = {
    name: config
    for name, config in TINY_CONFIGS.items()
    if name.split("-")[0] not in ("mixtral", "qwen2_moe", "qwen3_moe")
}

# Those that are repaired or trained, a second each. Of each kind one: gate and up apart, the same
# with biases and tied embeddings, both in one matrix, neither but transposed matrices, norms after
# the FFN and capped logits, scaled residuals and logits, attention and FFN side by side, and
# projections around the blocks. `make families` sets the variable.
TRAINED = (
    tuple(sorted(DENSE_CONFIGS))
    if "CFSP_EVERY_FAMILY" in os.environ
    else (
        "gemma2", "gpt2", "granite", "llama", "llama-biased", "opt-projected", "phi3",
        "stablelm-parallel",
    )
)  # fmt: skip


def build_tiny_model(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return a tiny random model; also norms and biases are random, so that none hides."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(TINY_CONFIGS[name](), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_tiny_model(name: str, directory: Path, **options: Any) -> None:
    """Write a tiny random model as a checkpoint."""
    model = build_tiny_model(name, options.pop("seed", 0), options.pop("dtype", torch.float32))
    model.save_pretrained(directory, **options)

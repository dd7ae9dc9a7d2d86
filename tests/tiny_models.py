"""One tiny random model for every family: a name and a config factory.

A new family needs one entry here. A name is a model type, or a model type with a variant after
a dash. Together they cover grouped and full attention, tied and untied embeddings, biases in
attention and FFN, sliding windows and layers of different attention types.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
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
}


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

"""What the config of any model says of its text decoder.

A multimodal config has the decoder's in one of its own; some types name no longest input.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


def text_config_of(config: PreTrainedConfig) -> Any:
    """Return the config of the text decoder; often the config itself."""
    return config.get_text_config(decoder=True)


def vocabulary_of(config: PreTrainedConfig) -> int:
    """Return the number of tokens that the model knows."""
    return int(text_config_of(config).vocab_size)


def longest_input_of(config: PreTrainedConfig) -> int | None:
    """Return how many tokens the model can read at once; None if its config does not say."""
    text = text_config_of(config)
    found = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return None if found is None else int(found)


PREDICTED = "num_nextn_predict_layers"


def prediction_layers(config: PreTrainedConfig) -> int:
    """Return how many layers of multi-token prediction a config names behind the last block."""
    return int(getattr(text_config_of(config), PREDICTED, None) or 0)


def head_size(config: Any) -> int:
    """Return the number of elements of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def text_path(config: PreTrainedConfig) -> tuple[str, ...]:
    """Return the names of the configs that lead to the one of the text decoder."""
    wanted = text_config_of(config)
    if wanted is config:
        return ()
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if inner is wanted:
            return (name,)
        if inner is not None and text_config_of(inner) is wanted:
            return (name, *text_path(inner))
    return ()

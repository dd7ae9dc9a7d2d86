"""What several formats ask of a model: its heads, and how many tokens a copy may read."""

from __future__ import annotations

from typing import Any

from cfsp.checkpoint.reading import Checkpoint


def context_limit(config: Any, *, has_windows: bool = False) -> tuple[int, str | None]:
    """Return how many tokens the copy may read, and why if it is less than the model may."""
    # A window changes nothing as long as the text fits into it: graphs without it are right then.
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    if has_windows or window is None or not slides or int(window) >= length:
        return length, None
    return int(window), (
        f"the model attends to the last {window} tokens in some blocks, which this format cannot "
        f"say: the context is limited to {window} tokens instead of {length}"
    )


def heads_of_blocks(source: Checkpoint) -> list[tuple[int, int]]:
    """Return the numbers of query heads and KV heads of every block."""
    config: Any = source.config
    heads, groups = int(config.num_attention_heads), int(config.num_key_value_heads)
    found = [(heads, groups)] * source.architecture.block_count
    for unit in source.architecture.stock_units:
        if unit.part == "kv":
            found[unit.block] = heads // groups * unit.width, unit.width
    return found


def head_size(config: Any) -> int:
    """Return the number of elements of one attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def unread_norms(source: Checkpoint) -> set[str]:
    """Return the norms before attention layers that are gone: stored, and read by nobody."""
    prefixes = (source.architecture.block_prefix(unit.block) for unit in source.architecture.gone)
    return {f"{prefix}input_layernorm.weight" for prefix in prefixes}

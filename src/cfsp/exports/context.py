"""How many tokens a copy may read, where its format knows no sliding window."""

from __future__ import annotations

from typing import Any


def context_limit(config: Any, *, has_windows: bool = False) -> tuple[int, str | None]:
    """Return how many tokens the copy may read, and why if it is less than the model may.

    A sliding window changes nothing as long as the text fits into it; graphs that have none
    are right up to there.

    Args:
        config: the model's.
        has_windows: whether the format knows sliding windows.
    """
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

"""What an export for vLLM's DeciLM class weighs, from its config and headers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from cfsp.checkpoint.tensor_file import TensorFile
from cfsp.errors import CheckpointError
from cfsp.speed.subjects import Footprint
from cfsp.speed.work import ModelWork


def decilm_footprint(directory: Path, *, head: bool, itemsize: int) -> Footprint:
    """Return parameters, size and work of an export.

    Args:
        directory: of the export.
        head: whether the language-model head is timed.
        itemsize: bytes of an element, of weights and of the cache.

    Raises:
        CheckpointError: it is damaged.
    """
    files = sorted(directory.glob("*.safetensors"))
    specs = {name: spec for file in files for name, spec in TensorFile(file).specs.items()}
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text("utf-8"))
        attentions = sum(not block["attention"]["no_op"] for block in config["block_configs"])
        heads, kv_heads, hidden, vocabulary = (
            int(config[key])
            for key in (
                "num_attention_heads",
                "num_key_value_heads",
                "hidden_size",
                "vocab_size",
            )
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} is damaged ({error}); export the model again"
        ) from error
    size = int(config.get("head_dim") or hidden // heads)
    in_blocks = sum(
        math.prod(spec.shape)
        for name, spec in specs.items()
        if name.startswith("model.layers.") and len(spec.shape) == 2
    )
    in_head = vocabulary * hidden if head else 0
    work = ModelWork(
        block_parameters=in_blocks,
        block_bytes=in_blocks * itemsize,
        head_parameters=in_head,
        head_bytes=in_head * itemsize,
        attention_width=attentions * heads * size,
        cache_bytes=2 * attentions * kv_heads * size * itemsize,
    )
    parameters = sum(math.prod(spec.shape) for spec in specs.values())
    return Footprint(parameters, sum(spec.nbytes for spec in specs.values()), work)

"""What a .gguf file weighs, from its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cfsp.errors import CheckpointError, MissingExtraError
from cfsp.speed.subjects import Footprint
from cfsp.speed.work import ModelWork

# llama.cpp keeps keys and values in F16 unless told otherwise.
_CACHE_ITEMSIZE = 2


def gguf_footprint(path: Path, *, head: bool) -> Footprint:
    """Return parameters, size and work of a .gguf file, in whatever types it stores.

    Raises:
        CheckpointError: the file is damaged.
        MissingExtraError: the package gguf is not installed.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError("reading a .gguf file", "gguf") from error
    try:
        reader = GGUFReader(path)
        return _footprint(reader, path.stat().st_size, head)
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF model: {error}") from error


def _footprint(reader: Any, size: int, head: bool) -> Footprint:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    matrices = [
        tensor
        for name, tensor in tensors.items()
        if name.startswith("blk.") and sum(int(n) > 1 for n in tensor.shape) == 2
    ]
    # Tied models have no output tensor: the embedding is read as the head.
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    architecture = reader.fields["general.architecture"].contents()
    blocks = int(_field(reader, f"{architecture}.block_count"))
    heads_L = _per_block(reader, f"{architecture}.attention.head_count", blocks)
    kv_heads_L = _per_block(reader, f"{architecture}.attention.head_count_kv", blocks, heads_L)
    hidden = int(_field(reader, f"{architecture}.embedding_length"))
    head_dim = int(
        _field(reader, f"{architecture}.attention.key_length", hidden // int(heads_L.max()))
    )
    work = ModelWork(
        block_parameters=sum(int(t.n_elements) for t in matrices),
        block_bytes=sum(int(t.n_bytes) for t in matrices),
        head_parameters=int(output.n_elements) if head else 0,
        head_bytes=int(output.n_bytes) if head else 0,
        attention_width=int(heads_L.sum()) * head_dim,
        cache_bytes=2 * int(kv_heads_L.sum()) * head_dim * _CACHE_ITEMSIZE,
    )
    return Footprint(sum(int(t.n_elements) for t in tensors.values()), size, work)


def _field(reader: Any, key: str, default: Any = None) -> Any:
    if key in reader.fields:
        return reader.fields[key].contents()
    if default is None:
        raise KeyError(f"no field {key}")
    return default


def _per_block(reader: Any, key: str, blocks: int, default: np.ndarray | None = None) -> np.ndarray:
    """Return a field that is one number for all blocks or one for each."""
    value = np.asarray(_field(reader, key, default), dtype=np.int64)
    return np.broadcast_to(value, (blocks,))

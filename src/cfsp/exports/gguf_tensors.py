"""A checkpoint's tensors under GGUF's names, in llama.cpp's layout, in the wanted type.

Tensors are read, reordered and converted one at a time.

Shapes: D hidden, N heads, H head size; q and k are (N H, D).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.context import heads_of_blocks, unread_norms
from cfsp.exports.gguf_architecture import Architecture

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that will be written.

    Attributes:
        name: in the file.
        shape: rows first, as in the checkpoint.
        kind: how it is stored.
        read: makes it, in float32.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        from gguf import quant_shape_to_byte_shape

        return math.prod(quant_shape_to_byte_shape(self.shape, self.kind))


def gguf_tensors(
    source: Checkpoint, architecture: Architecture, kind: GGMLQuantizationType
) -> list[GgufTensor]:
    """Return what a file of this architecture holds, in the checkpoint's order.

    Args:
        source: the checkpoint.
        architecture: what will read the file.
        kind: how matrices are stored; vectors are always float32, and matrices whose rows
            don't divide into blocks of this type become float16.
    """
    names = _names(source, architecture)
    return [_tensor(source, architecture, *pair, kind) for pair in names.items()]


def _names(source: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Return GGUF's name of every tensor that is not fused into another.

    Raises:
        ExportError: llama.cpp has no place for a tensor.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    graph = next(each for each, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = get_tensor_name_map(graph, source.architecture.block_count)
    unread = unread_norms(source)
    found: dict[str, str] = {}
    for name in source.specs:
        if name in unread or (architecture.fused and ("k_proj" in name or "v_proj" in name)):
            continue
        asked = name.replace(".q_proj", ".qkv_proj") if architecture.fused else name
        gguf_name = known.get_name(asked, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ExportError(f"llama.cpp has no place for the tensor {name}")
        found[name] = gguf_name
    return found


def _tensor(
    source: Checkpoint,
    architecture: Architecture,
    name: str,
    gguf_name: str,
    kind: GGMLQuantizationType,
) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    is_fused = architecture.fused and ".q_proj." in name
    parts = [name.replace(".q_proj.", f".{m}_proj.") for m in "qkv"] if is_fused else [name]
    rest = source.specs[name].shape[1:]
    shape = (sum(source.specs[part].shape[0] for part in parts), *rest)
    if len(shape) == 1:
        kind = GGMLQuantizationType.F32
    elif shape[-1] % GGML_QUANT_SIZES[kind][0] != 0:
        kind = GGMLQuantizationType.F16
    heads = _heads_to_reorder(source, architecture, name)

    def read() -> Tensor:
        tensor = torch.cat([source.read(part).float() for part in parts])
        if architecture.norms_from_one and name.endswith("norm.weight"):
            tensor = tensor + 1
        return tensor if heads is None else neighbours_together(tensor, heads)

    return GgufTensor(gguf_name, shape, kind, read)


def _heads_to_reorder(source: Checkpoint, architecture: Architecture, name: str) -> int | None:
    blocks = re.escape(source.architecture.blocks)
    found = re.match(rf"{blocks}\.(\d+)\.self_attn\.([qk])_proj\.", name)
    if not architecture.neighbours or found is None:
        return None
    return heads_of_blocks(source)[int(found[1])][found[2] == "k"]


def neighbours_together(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k, head by head, so that element i + half follows element i."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)

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
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]  # rows first, as in the checkpoint
    kind: GGMLQuantizationType  # as it is stored
    read: Callable[[], Tensor]  # in float32

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        from gguf import quant_shape_to_byte_shape

        return math.prod(quant_shape_to_byte_shape(self.shape, self.kind))


def gguf_tensors(
    source: Checkpoint, architecture: Architecture, kind: GGMLQuantizationType
) -> list[GgufTensor]:
    """Return what a file of this architecture holds, in the checkpoint's order."""
    # Vectors are always float32; matrices whose rows don't divide into blocks become float16.
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    graph = next(each for each, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = get_tensor_name_map(graph, source.architecture.block_count)
    unread, found = unread_norms(source), []
    for name in source.specs:
        if name in unread or (architecture.fused and re.search(r"\.[kv]_proj\.", name)):
            continue
        is_fused = architecture.fused and ".q_proj." in name
        asked = name.replace(".q_proj", ".qkv_proj") if is_fused else name
        gguf_name = known.get_name(asked, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ExportError(f"llama.cpp has no place for the tensor {name}")
        parts = [name.replace(".q_proj.", f".{m}_proj.") for m in "qkv"] if is_fused else [name]
        found.append(_tensor(source, architecture, parts, gguf_name, kind))
    return found


def _tensor(
    source: Checkpoint,
    architecture: Architecture,
    parts: list[str],
    gguf_name: str,
    kind: GGMLQuantizationType,
) -> GgufTensor:
    """Return the tensor that some of the checkpoint's make, one below the other."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    rest = source.specs[parts[0]].shape[1:]
    shape = (sum(source.specs[part].shape[0] for part in parts), *rest)
    if len(shape) == 1:
        kind = GGMLQuantizationType.F32
    elif shape[-1] % GGML_QUANT_SIZES[kind][0] != 0:
        kind = GGMLQuantizationType.F16
    blocks = re.escape(source.architecture.blocks)
    turned = re.match(rf"{blocks}\.(\d+)\.self_attn\.([qk])_proj\.", parts[0])

    def read() -> Tensor:
        tensor = torch.cat([source.read(part).float() for part in parts])
        if architecture.rhythm and parts[0].endswith("norm.weight"):
            tensor = tensor + 1
        if architecture.is_llama and turned is not None:
            heads = heads_of_blocks(source)[int(turned[1])][turned[2] == "k"]
            tensor = neighbours_together(tensor, heads)
        return tensor

    return GgufTensor(gguf_name, shape, kind, read)


def neighbours_together(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k, head by head, so that element i + half follows element i."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)

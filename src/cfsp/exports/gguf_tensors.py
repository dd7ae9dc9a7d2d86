"""A checkpoint's tensors under GGUF's names, in llama.cpp's layout, in the wanted type.

Tensors are read, reordered and converted one at a time.

Shapes: D hidden, N heads, H head size; q and k are (N H, D).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
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

# Names within a block, and outside one: transformers -> GGUF.
_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# The same in blocks whose norms also follow what they normalise.
_WITH_NORMS_AFTER = {
    **_IN_BLOCK,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


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
        from gguf import GGML_QUANT_SIZES

        block, size = GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block) * int(size)


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
    if architecture.fused:
        pieces = list(_with_fused_qkv(source))
    else:
        pieces = [(name, (name,)) for name in source.specs]
    unread = unread_norms(source)
    pieces = [(name, parts) for name, parts in pieces if name not in unread]
    return [_tensor(source, architecture, name, parts, kind) for name, parts in pieces]


def fallbacks(tensors: list[GgufTensor], kind: GGMLQuantizationType) -> list[GgufTensor]:
    """Return the matrices that could not be stored in the wanted type."""
    return [t for t in tensors if len(t.shape) > 1 and t.kind != kind]


def gguf_name(source: Checkpoint, architecture: Architecture, name: str) -> str:
    """Return GGUF's name of a tensor.

    Raises:
        ExportError: it has none.
    """
    stem, _, suffix = name.rpartition(".")
    block = re.match(rf"{re.escape(source.architecture.blocks)}\.(\d+)\.(.+)$", stem)
    if block is None:
        found = _OUTSIDE.get(stem)
    else:
        names = _WITH_NORMS_AFTER if architecture.norms_after else _IN_BLOCK
        inner = names.get(block[2])
        found = inner and f"blk.{block[1]}.{inner}"
    if found is None:
        raise ExportError(f"llama.cpp has no place for the tensor {name}")
    return f"{found}.{suffix}"


def _with_fused_qkv(source: Checkpoint) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name in source.specs:
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            continue
        parts: tuple[str, ...] = (name,)
        if name.endswith(".q_proj.weight"):
            parts = tuple(name.replace(".q_proj.", f".{m}_proj.") for m in "qkv")
        yield name, parts


def _tensor(
    source: Checkpoint,
    architecture: Architecture,
    name: str,
    parts: tuple[str, ...],
    kind: GGMLQuantizationType,
) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    rest = source.specs[parts[0]].shape[1:]
    shape = (sum(source.specs[part].shape[0] for part in parts), *rest)
    if len(shape) == 1:
        kind = GGMLQuantizationType.F32
    elif shape[-1] % GGML_QUANT_SIZES[kind][0] != 0:
        kind = GGMLQuantizationType.F16
    heads = _heads_to_reorder(source, architecture, name)

    def read() -> Tensor:
        tensors = [source.read(part).float() for part in parts]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if architecture.norms_from_one and name.endswith("norm.weight"):
            tensor = tensor + 1
        return tensor if heads is None else neighbours_together(tensor, heads)

    found = gguf_name(source, architecture, name)
    return GgufTensor(found.replace("attn_q.", "attn_qkv.") if len(parts) > 1 else found,
                      shape, kind, read)  # fmt: skip


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

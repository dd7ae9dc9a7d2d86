"""Target `gguf`: one file for llama.cpp and everything built on it, blocks at their own widths.

The file is written by the package `gguf`, tensor by tensor. Types that it can't make (K-quants
and the like) come from llama.cpp's own quantiser, from a temporary file in the checkpoint's type.

Shapes: D hidden, N heads, H head size; q and k are (N H, D).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.checkpoint.gguf_tokenizer import fields_of
from cfsp.checkpoint.llama_cpp import (
    LlamaCpp,
    has_llama_cpp,
    llama_cpp_version,
    quantise,
    tokens_differ,
)
from cfsp.checkpoint.loading import own_dtype
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.text_config import head_size
from cfsp.errors import CannotSayError, ExportError, MissingExtraError, UsageError
from cfsp.exports.common import (
    Verification,
    Written,
    context_limit,
    heads_of_blocks,
    unread_norms,
    verified,
)
from cfsp.exports.gguf_architecture import Architecture, architecture_of, rope_of
from cfsp.progress import item_progress
from cfsp.text.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, SpecialVocab

_OWN_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
WRITTEN_HERE = ("f32", "f16", "bf16", "q8_0")
BY_LLAMA_CPP = (
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
    "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
)  # fmt: skip
# Relative error of the logits that a type may cause. Logits of another model differ by 1.4; few
# bits can come near that on weights without structure, so for them only nonsense is refused.
_TOLERANCES = {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.1, "q6_k": 0.3}
_OTHER_TYPES = 1.2
_LEAST_WITH_GELU = 3e-3  # llama.cpp looks GELU up in a table of float16


def write(
    source: Checkpoint, out: Path, weight_type: str | None = None, pre_tokenizer: str | None = None
) -> Written:
    """Write the file."""
    try:
        from gguf import GGMLQuantizationType, LlamaFileType, RopeScalingType
    except ImportError as error:
        raise MissingExtraError("gguf export", "export") from error
    own = _OWN_TYPES.get(own_dtype(source), "bf16")
    name = str(weight_type or own).lower()
    if name not in WRITTEN_HERE + BY_LLAMA_CPP:
        raise UsageError(
            f"unknown --type {weight_type}; expected one of "
            f"{', '.join(WRITTEN_HERE + BY_LLAMA_CPP)}"
        )
    if name in BY_LLAMA_CPP and not has_llama_cpp():
        raise MissingExtraError(f"gguf export in {name}", "llamacpp")
    architecture = architecture_of(source)
    context, limited = context_limit(source.config, has_windows=bool(architecture.rhythm))
    in_file = name if name in WRITTEN_HERE else own
    kind = GGMLQuantizationType[in_file.upper()]
    fields, factors_R = rope_of(source.config, architecture)
    if "rope_scaling_type" in fields:
        fields["rope_scaling_type"] = RopeScalingType[fields["rope_scaling_type"].upper()]
    fields = _fields(source, architecture, context, in_file) | fields
    words, special = fields_of(
        load_tokenizer(source.directory), source.config.vocab_size, pre_tokenizer
    )
    tensors = gguf_tensors(source, architecture, kind)
    if factors_R is not None:
        f32 = GGMLQuantizationType.F32
        tensors.append(GgufTensor("rope_freqs.weight", (len(factors_R),), f32, lambda: factors_R))
    notes = [limited] if limited else []
    if not has_llama_cpp():
        notes.append("not verified, because no llama.cpp is installed: pip install '.[llamacpp]'")
    if name in WRITTEN_HERE:
        _write_file(out, architecture.name, fields | words, special, tensors)
    else:
        full = out.with_name(out.name + ".full")
        try:
            _write_file(full, architecture.name, fields | words, special, tensors)
            quantise(full, out, int(LlamaFileType[f"MOSTLY_{name.upper()}"]))
        finally:
            full.unlink(missing_ok=True)
    notes += _notes(tensors, name)
    return Written(
        f"{architecture.name} in {name}",
        partial(_verified, source, out, name, architecture, context) if has_llama_cpp() else None,
        notes,
        "llama-server -m {out}",
    )


def _write_file(
    out: Path,
    architecture: str,
    fields: dict[str, Any],
    special: SpecialVocab,
    tensors: list[GgufTensor],
) -> None:
    import numpy as np
    from gguf import GGUFWriter, quant_shape_to_byte_shape
    from gguf.quants import quantize

    writer = GGUFWriter(out, architecture)
    try:
        for field, value in fields.items():
            if value is not None:
                getattr(writer, f"add_{field}")(value)
        special.add_to_gguf(writer, quiet=True)
        for tensor in tensors:
            nbytes = math.prod(quant_shape_to_byte_shape(tensor.shape, tensor.kind))
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), nbytes, tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with item_progress("gguf", len(tensors), "tensor") as bar:
            for tensor in tensors:
                writer.write_tensor_data(quantize(tensor.read().numpy(), tensor.kind))
                bar.update()
    finally:
        writer.close()


def _fields(
    source: Checkpoint, architecture: Architecture, context: int, type_name: str
) -> dict[str, Any]:
    """Return the file's fields, by the names of the writer's methods without `add_`."""
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    config: Any = source.config
    widths = source.architecture.of_part("ffn").widths
    heads, groups = map(list, zip(*heads_of_blocks(source), strict=True))
    of_blocks = {"feed_forward_length": widths, "head_count": heads, "head_count_kv": groups}
    windows = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    mixture = "ALL" if type_name == "f32" else "MOSTLY"
    size, name = head_size(config), Path(source.label).name or source.directory.resolve().name
    if name == "mistral":  # by this very name transformers takes another type than the file's
        name = "mistral-pruned"
    return {
        "name": name,
        "file_type": LlamaFileType[f"{mixture}_{type_name.upper()}"],
        "quantization_version": GGML_QUANT_VERSION,
        "block_count": len(widths),
        "context_length": context,
        **{name: getattr(config, name) for name in windows if architecture.rhythm},
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        **{name: each if architecture.ragged else each[0] for name, each in of_blocks.items()},
        "key_length": size,
        "value_length": size,
        "rope_dimension_count": size,
        "layer_norm_rms_eps": config.rms_norm_eps,
    }


def _notes(tensors: list[GgufTensor], name: str) -> list[str]:
    """Say which rows do not divide into blocks of weights."""
    if name in _OWN_TYPES.values():
        return []
    rows = {tensor.shape[-1] for tensor in tensors if len(tensor.shape) > 1}
    block = 256 if "_k" in name or name == "iq4_xs" else 32
    odd = sorted(row for row in rows if row % block)
    if not odd:
        return []
    shown = ", ".join(map(str, odd[:6])) + (", ..." if len(odd) > 6 else "")
    return [
        f"rows of {shown} weights do not divide into blocks of {block}, so they are stored in "
        f"a larger type; prune with --set multiple={block} to avoid it in the FFN"
    ]


def _verified(
    source: Checkpoint, out: Path, type_name: str, architecture: Architecture, context: int
) -> Verification:
    """Compare tokenizer and logits with transformers'."""
    difference = tokens_differ(out, load_tokenizer(source.directory))
    if difference:
        raise ExportError(
            f"llama.cpp splits text differently: {difference}; give the pre-tokenizer's name with "
            "--pre-tokenizer; nothing was kept"
        )
    tolerance = _TOLERANCES.get(type_name, _OTHER_TYPES)
    if architecture.activation != "silu":
        tolerance = max(tolerance, _LEAST_WITH_GELU)
    with LlamaCpp(out) as llama:
        if difference is None:  # although it is installed, and has loaded the copy
            raise ExportError(
                f"{llama_cpp_version()} ends when it splits text by the copy's tokenizer; nothing "
                "was kept"
            )
        return verified(source, llama_cpp_version(), llama.feed, tolerance, context=context)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]  # rows first, as in the checkpoint
    kind: GGMLQuantizationType  # as it is stored
    read: Callable[[], Tensor]  # in float32


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
        # A graph without an output matrix takes the embeddings, of which a file may have a copy.
        if architecture.tied_only and name in source.copies:
            continue
        if name in unread or (architecture.fused and re.search(r"\.[kv]_proj\.", name)):
            continue
        is_fused = architecture.fused and ".q_proj." in name
        asked = name.replace(".q_proj", ".qkv_proj") if is_fused else name
        gguf_name = known.get_name(asked, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise CannotSayError(f"llama.cpp has no place for the tensor {name}")
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
    block = source.architecture.block_of(parts[0])
    turned = re.search(r"\.self_attn\.([qk])_proj\.", parts[0])

    def read() -> Tensor:
        tensor = torch.cat([source.read(part).float() for part in parts])
        if architecture.rhythm and parts[0].endswith("norm.weight"):
            tensor = tensor + 1
        if architecture.is_llama and block is not None and turned is not None:
            heads = heads_of_blocks(source)[block][turned[1] == "k"]
            tensor = neighbours_together(tensor, heads)
        return tensor

    return GgufTensor(gguf_name, shape, kind, read)


def neighbours_together(tensor: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k, head by head, so that element i + half follows element i."""
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)

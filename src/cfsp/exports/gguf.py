"""Target `gguf`: one file for llama.cpp and everything built on it, blocks at their own widths.

The file is written by the package `gguf`, tensor by tensor. Types that it can't make (K-quants
and the like) come from llama.cpp's own quantiser, from a temporary file in the checkpoint's type.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.checkpoint.llama_cpp_library import has_llama_cpp, llama_cpp_version
from cfsp.checkpoint.llama_cpp_tokens import tokens_differ
from cfsp.checkpoint.loading import compute_dtype
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError, MissingExtraError, UsageError
from cfsp.exports.context import context_limit, head_size, heads_of_blocks
from cfsp.exports.gguf_architecture import Architecture, architecture_of, rope_of
from cfsp.exports.gguf_tensors import GgufTensor, gguf_tensors
from cfsp.exports.gguf_tokenizer import read_tokenizer
from cfsp.exports.llama_cpp import LlamaCpp, quantise
from cfsp.exports.verification import ExportOptions, Verification, Written, verified
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
# llama.cpp looks GELU up in a table of float16.
_LEAST_WITH_GELU = 3e-3


def write(source: Checkpoint, out: Path, options: ExportOptions) -> Written:
    """Write the file."""
    try:
        from gguf import GGMLQuantizationType, LlamaFileType
    except ImportError as error:
        raise MissingExtraError("gguf export", "export") from error
    own = _OWN_TYPES.get(compute_dtype(source), "bf16")
    name = (options.weight_type or own).lower()
    if name not in WRITTEN_HERE + BY_LLAMA_CPP:
        raise UsageError(
            f"unknown --type {options.weight_type}; expected one of "
            f"{', '.join(WRITTEN_HERE + BY_LLAMA_CPP)}"
        )
    architecture = architecture_of(source)
    context, limited = context_limit(source.config, has_windows=bool(architecture.rhythm))
    in_file = name if name in WRITTEN_HERE else own
    kind = GGMLQuantizationType[in_file.upper()]
    fields, factors_R = rope_of(source.config, architecture)
    fields = _fields(source, architecture, context, in_file) | fields
    words, special = read_tokenizer(
        load_tokenizer(source.directory), source.config.vocab_size, options.pre_tokenizer
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
        notes += _fallback_notes(tensors, kind)
    else:
        full = out.with_name(out.name + ".full")
        try:
            _write_file(full, architecture.name, fields | words, special, tensors)
            quantise(full, out, int(LlamaFileType[f"MOSTLY_{name.upper()}"]))
        finally:
            full.unlink(missing_ok=True)
        notes += _mixture_notes(out, name)
    return Written(
        f"{architecture.name} in {name}",
        partial(_verified, source, out, name, architecture, context) if has_llama_cpp() else None,
        tuple(notes),
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
    from gguf import GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(out, architecture)
    try:
        for field, value in fields.items():
            if value is not None:
                getattr(writer, f"add_{field}")(value)
        special.add_to_gguf(writer, quiet=True)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind
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
    size = head_size(config)
    return {
        "name": Path(source.label).name,
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


def _fallback_notes(tensors: list[GgufTensor], kind: GGMLQuantizationType) -> list[str]:
    kept = [each for each in tensors if len(each.shape) > 1 and each.kind != kind]
    if not kept:
        return []
    lengths = sorted({tensor.shape[-1] for tensor in kept})
    return [
        f"{len(kept)} matrices are stored in f16, because their rows of "
        f"{_some(lengths)} do not divide into blocks of {kind.name.lower()} (32 weights); "
        "prune with --set multiple=32 to avoid it"
    ]


def _mixture_notes(path: Path, name: str) -> list[str]:
    """Say which types llama.cpp chose: rows that 256 doesn't divide can't be K-quants."""
    from gguf import GGUFReader

    tensors = [tensor for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1]
    counts = Counter(tensor.tensor_type.name.lower() for tensor in tensors)
    notes = [f"{name} as llama.cpp mixes it: {', '.join(f'{n} {t}' for t, n in counts.items())}"]
    odd = sorted({int(t.shape[0]) for t in tensors if int(t.shape[0]) % 256})
    if odd and "_k" in name:
        notes.append(
            f"rows of {_some(odd)} weights do not divide into blocks of 256, so llama.cpp stores "
            "them in a larger type; prune with --set multiple=256 to avoid it in the FFN"
        )
    return notes


def _some(numbers: list[int]) -> str:
    shown = ", ".join(str(n) for n in numbers[:6])
    return shown if len(numbers) <= 6 else f"{shown}, ..."


def _verified(
    source: Checkpoint,
    out: Path,
    type_name: str,
    architecture: Architecture,
    context: int,
) -> Verification:
    """Compare tokenizer, logits and (unless quantised) greedy decoding with transformers'."""
    if difference := tokens_differ(out, load_tokenizer(source.directory)):
        raise ExportError(
            f"llama.cpp splits text differently: {difference}; give the pre-tokenizer's name with "
            "--pre-tokenizer; nothing was kept"
        )
    tolerance = _TOLERANCES.get(type_name, _OTHER_TYPES)
    if architecture.activation != "silu":
        tolerance = max(tolerance, _LEAST_WITH_GELU)
    with LlamaCpp(out) as llama:
        return verified(
            source,
            llama_cpp_version(),
            llama.feed,
            tolerance,
            context=context,
            decodes=type_name == "f32",
        )

"""Is a .gguf file the same model? llama.cpp answers if it is installed, else the tensors do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cfsp.checkpoint.llama_cpp_library import has_llama_cpp, llama_cpp_version
from cfsp.checkpoint.llama_cpp_tokens import tokens_differ
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.gguf_architecture import Architecture
from cfsp.exports.gguf_tensors import GgufTensor
from cfsp.exports.llama_cpp import LlamaCpp
from cfsp.exports.verification import Verification, verified
from cfsp.text.tokenizers import load_tokenizer

# Relative error of the logits that a type may cause. Logits of another model differ by 1.4; few
# bits can come near that on weights without structure, so for them only nonsense is refused.
_TOLERANCES = {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.1, "q6_k": 0.3}
_OTHER_TYPES = 1.2
# llama.cpp looks GELU up in a table of float16.
_LEAST_WITH_GELU = 3e-3


def verify(
    source: Checkpoint,
    out: Path,
    type_name: str,
    architecture: Architecture,
    context: int,
    tensors: Sequence[GgufTensor],
) -> Verification:
    """Compare tokenizer, logits and (unless quantised) greedy decoding with transformers'.

    Args:
        source: the checkpoint.
        out: the file.
        type_name: how matrices are stored.
        architecture: what reads it.
        context: how many tokens it may read.
        tensors: what was written.
    """
    tolerance = _TOLERANCES.get(type_name, _OTHER_TYPES)
    if not has_llama_cpp():
        return _verify_tensors(out, tensors, tolerance)
    if difference := tokens_differ(out, load_tokenizer(source.directory)):
        raise ExportError(
            f"llama.cpp splits text differently: {difference}; give the pre-tokenizer's name with "
            "--pre-tokenizer; nothing was kept"
        )
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


def _verify_tensors(out: Path, tensors: Sequence[GgufTensor], tolerance: float) -> Verification:
    """Compare the stored tensors with the checkpoint's; logits need a llama.cpp."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored: dict[str, Any] = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    largest = squares = reference = 0.0
    for tensor in tensors:
        found = torch.from_numpy(
            dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type).copy()
        )
        expected = tensor.read()
        difference = (found.reshape(expected.shape) - expected).double()
        largest = max(largest, float(difference.abs().max()))
        squares += float(difference.square().sum())
        reference += float(expected.double().square().sum())
    error = (squares / reference) ** 0.5
    if error > tolerance:
        raise ExportError(
            f"the stored weights differ from the checkpoint's: relative error {error:.2g}, "
            f"expected at most {tolerance:.2g}; nothing was kept"
        )
    return Verification(
        "the gguf reader (weights only; no llama.cpp)", 0, largest, error, tolerance
    )

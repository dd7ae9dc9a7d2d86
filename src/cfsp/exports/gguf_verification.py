"""Is a .gguf file the same model? llama.cpp answers if it is installed, else the tensors do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cfsp.checkpoint.llama_cpp_library import has_llama_cpp, llama_cpp_version
from cfsp.checkpoint.llama_cpp_tokens import tokens_differ
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import ExportError
from cfsp.exports.context import context_limit
from cfsp.exports.gguf_architecture import architecture_of
from cfsp.exports.gguf_tensors import gguf_tensors
from cfsp.exports.llama_cpp import LlamaCpp
from cfsp.exports.target import ExportOptions
from cfsp.exports.verification import (
    Verification,
    compare_logits,
    greedy_after,
    greedy_by,
    logits_of,
    probe_lengths,
    probe_tokens,
    reference_model,
)
from cfsp.text.tokenizers import load_tokenizer

# Relative error of the logits that a type may cause. Logits of another model differ by 1.4; few
# bits can come near that on weights without structure, so for them only nonsense is refused.
_TOLERANCES = {"f32": 1e-4, "f16": 0.02, "bf16": 0.1, "q8_0": 0.1, "q6_k": 0.3}
_OTHER_TYPES = 1.2
# llama.cpp looks GELU up in a table of float16.
_LEAST_WITH_GELU = 3e-3


def verify(source: Checkpoint, out: Path, options: ExportOptions) -> Verification:
    """Compare tokenizer, logits and (unless quantised) greedy decoding with transformers'."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(out).get_field("general.file_type")
    assert field is not None
    file_type = LlamaFileType(int(field.contents())).name
    name = file_type.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
    if not has_llama_cpp():
        return _verify_tensors(source, out, name)
    _check_tokenizer(source, out)
    tolerance = _TOLERANCES.get(name, _OTHER_TYPES)
    architecture = architecture_of(source)
    if architecture.activation != "silu":
        tolerance = max(tolerance, _LEAST_WITH_GELU)
    has_windows = bool(architecture.rhythm)
    count, steps = probe_lengths(context_limit(source.config, has_windows=has_windows)[0])
    tokens = probe_tokens(source, count)
    model = reference_model(source)
    expected_TV = logits_of(model, tokens)
    with LlamaCpp(out, context=512) as llama:
        found_TV = llama.feed(tokens)
        greedy = None
        if name == "f32":
            llama.forget()
            found = greedy_by(lambda new: llama.feed(new)[-1], tokens, steps)
            greedy = (greedy_after(model, tokens, found), found)
    return compare_logits(llama_cpp_version(), expected_TV, found_TV, tolerance, greedy)


def _check_tokenizer(source: Checkpoint, out: Path) -> None:
    difference = tokens_differ(out, load_tokenizer(source.directory))
    if difference:
        raise ExportError(
            f"llama.cpp splits text differently: {difference}; give the pre-tokenizer's name with "
            "--pre-tokenizer; nothing was kept"
        )


def _verify_tensors(source: Checkpoint, out: Path, name: str) -> Verification:
    """Compare the stored tensors with the checkpoint's; logits need a llama.cpp."""
    from gguf import GGMLQuantizationType, GGUFReader
    from gguf.quants import dequantize

    stored: dict[str, Any] = {tensor.name: tensor for tensor in GGUFReader(out).tensors}
    architecture = architecture_of(source)
    largest = squares = reference = 0.0
    for tensor in gguf_tensors(source, architecture, GGMLQuantizationType.F32):
        found = torch.from_numpy(
            dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type).copy()
        )
        expected = tensor.read()
        difference = (found.reshape(expected.shape) - expected).double()
        largest = max(largest, float(difference.abs().max()))
        squares += float(difference.square().sum())
        reference += float(expected.double().square().sum())
    error = (squares / reference) ** 0.5
    tolerance = _TOLERANCES.get(name, _OTHER_TYPES)
    if error > tolerance:
        raise ExportError(
            f"the stored weights differ from the checkpoint's: relative error {error:.2g}, "
            f"expected at most {tolerance:.2g}; nothing was kept"
        )
    return Verification(
        "the gguf reader (weights only; no llama.cpp)", 0, largest, error, tolerance
    )

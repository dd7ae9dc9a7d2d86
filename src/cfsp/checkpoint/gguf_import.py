"""A .gguf file as an ordinary checkpoint: dequantised once by transformers, then cached."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import torch

from cfsp.checkpoint.gguf_header import check_gguf
from cfsp.checkpoint.output import staged_directory
from cfsp.errors import CheckpointError, MissingExtraError, OutputError
from cfsp.progress import library_progress


def cache_directory() -> Path:
    """Return where converted models are kept: $CFSP_CACHE, or cfsp in the user's cache."""
    if explicit := os.environ.get("CFSP_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cfsp"


def import_gguf(path: Path) -> Path:
    """Return a directory with the file's config, tokenizer and weights as safetensors.

    Weights become bfloat16, or float32 or float16 where that is what the file mostly stores.
    The directory is named after the file's content, so it is made only once.

    Raises:
        CheckpointError: the file is damaged or of an architecture that transformers can't read.
        MissingExtraError: the package gguf is not installed.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    target = cache_directory() / "gguf" / f"{path.stem}-{digest[:16]}"
    if not (target / "config.json").is_file():
        check_gguf(path)
        dtype = _stored_dtype(path)
        try:
            with staged_directory(target) as staging, library_progress():
                _convert(path, dtype, staging)
        except OutputError:
            # Another process may have converted the same file meanwhile.
            if not (target / "config.json").is_file():
                raise
    return target


def _stored_dtype(path: Path) -> torch.dtype:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError("reading a .gguf file", "gguf") from error
    try:
        # Norms are stored in F32 in every file; matrices tell.
        matrices = [t for t in GGUFReader(path).tensors if len(t.shape) > 1]
    except Exception as error:  # the reader has no exception type of its own
        raise CheckpointError(f"{path} is not a readable GGUF file: {error}") from error
    if not matrices:
        raise CheckpointError(
            f"{path} holds no weight matrices; use the safetensors of the same model"
        )
    kind = Counter(t.tensor_type.name for t in matrices).most_common(1)[0][0]
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def _convert(path: Path, dtype: torch.dtype, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # transformers has no one exception type for this
        raise CheckpointError(
            f"transformers cannot read {path}: {error}; use the safetensors of the same model"
        ) from error
    # The weights are dense now; with these left, saving would announce them as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

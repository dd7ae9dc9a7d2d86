"""llama.cpp itself, through the bindings of llama-cpp-py-sync: read, compute, quantise.

Its C interface is called directly, because the package's own class gives no logits.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from cfsp.checkpoint.llama_cpp_library import last_error, llama_cpp_library, llama_cpp_version
from cfsp.errors import ExportError

_F32 = 0  # ggml_type


class LlamaCpp:
    """A .gguf file, loaded for one sequence; keys and values are kept in float32.

    Use it as a context manager: memory belongs to the library and is freed at the end.

    Args:
        path: the file.
        context: tokens that fit, prompt and continuation together.

    Raises:
        MissingExtraError: no llama.cpp is installed.
        ExportError: llama.cpp refuses the file.
    """

    def __init__(self, path: Path, context: int = 512) -> None:
        self._ffi, self._lib = llama_cpp_library("running llama.cpp", "export")
        model_settings = self._lib.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), model_settings)
        if self._model == self._ffi.NULL:
            raise ExportError(f"{llama_cpp_version()} cannot load {path.name}: {last_error()}")
        settings = self._lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        # Its threads wait for each other busily: as many as torch is given, on a shared machine.
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = 0
        self._context = self._lib.llama_init_from_model(self._model, settings)
        if self._context == self._ffi.NULL:
            self._lib.llama_model_free(self._model)
            raise ExportError(f"{llama_cpp_version()} cannot run {path.name}: {last_error()}")
        self._vocabulary = self._lib.llama_model_get_vocab(self._model)
        self._past = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def forget(self) -> None:
        """Start a new sequence."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._past = 0

    def rewind(self, length: int) -> None:
        """Forget all tokens of the sequence but the first ones."""
        memory = self._lib.llama_get_memory(self._context)
        removed = self._lib.llama_memory_seq_rm(memory, 0, length, -1)
        assert removed, "a cache of keys and values can be cut anywhere"
        self._past = length

    def feed(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Read more tokens of the sequence and return the logits after them.

        Args:
            tokens: one at least.
            last: of how many of them logits are wanted; None for all.

        Returns:
            logits_TV after each of the last tokens.
        """
        wanted = len(tokens) if last is None else last
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i] = token
                batch.pos[i] = self._past + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i >= len(tokens) - wanted
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status != 0:
            raise ExportError(f"{llama_cpp_version()} failed with status {status}")
        self._past += len(tokens)
        width = self._lib.llama_vocab_n_tokens(self._vocabulary)
        pointer = self._lib.llama_get_logits(self._context)
        data = self._ffi.buffer(pointer, wanted * width * 4)
        logits = np.frombuffer(data, dtype=np.float32).reshape(wanted, width)
        return torch.from_numpy(logits.copy())


def quantise(source: Path, target: Path, file_type: int) -> None:
    """Write a quantised copy of a .gguf file.

    Args:
        source: a file in float32, float16 or bfloat16.
        target: the new file.
        file_type: number in llama.cpp's enum llama_ftype.

    Raises:
        MissingExtraError: no llama.cpp is installed.
        ExportError: llama.cpp refuses.
    """
    ffi, lib = llama_cpp_library("running llama.cpp", "export")
    settings = ffi.new("llama_model_quantize_params *")
    settings[0] = lib.llama_model_quantize_default_params()
    settings.ftype = file_type
    status = lib.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if status != 0:
        raise ExportError(f"{llama_cpp_version()} cannot quantise the model: {last_error()}")

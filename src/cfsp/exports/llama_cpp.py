"""llama.cpp itself, through the bindings of llama-cpp-py-sync: read, compute, quantise.

Its C interface is called directly, because the package's own class gives no logits of chosen
tokens.

Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfsp.checkpoint.llama_cpp_library import last_error, llama_cpp_library, llama_cpp_version
from cfsp.errors import ExportError

_F32 = 0  # ggml_type


class LlamaCpp:
    """A .gguf file, loaded; a context manager, because its memory belongs to the library.

    `context` tokens of one sequence fit, prompt and what follows; None is to `start` later.
    """

    def __init__(self, path: Path, context: int | None = 512, threads: int | None = None) -> None:
        self._ffi, self._lib = llama_cpp_library()
        settings = self._lib.llama_model_default_params()
        settings.n_gpu_layers = 0
        self._name = path.name
        self._threads = threads or torch.get_num_threads()
        self._context = self._ffi.NULL
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), settings)
        if self._model == self._ffi.NULL:
            raise ExportError(f"{llama_cpp_version()} cannot load {path.name}: {last_error()}")
        vocabulary = self._lib.llama_model_get_vocab(self._model)
        self.vocabulary: int = self._lib.llama_vocab_n_tokens(vocabulary)
        if context is not None:  # as exact as it can be
            exact = {"n_ubatch": context, "type_k": _F32, "type_v": _F32, "flash_attn_type": 0}
            try:
                self.start(context, **exact)
            except ExportError:
                self.__exit__()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)

    def start(self, context: int, sequences: int = 1, **settings: Any) -> None:
        """Make room for new sequences of so many tokens together, by the library's settings."""
        if self._context != self._ffi.NULL:
            self._lib.llama_free(self._context)
        asked = self._lib.llama_context_default_params()
        asked.n_ctx = asked.n_batch = context
        asked.n_seq_max = sequences
        asked.n_threads = asked.n_threads_batch = self._threads
        for name, value in settings.items():
            setattr(asked, name, value)
        self._context = self._lib.llama_init_from_model(self._model, asked)
        if self._context == self._ffi.NULL:
            raise ExportError(
                f"{llama_cpp_version()} cannot run {self._name} with {context} tokens: "
                f"{last_error()}"
            )
        self._past = 0

    def forget(self) -> None:
        """Begin all sequences anew."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._past = 0

    def rewind(self, length: int) -> None:
        """Forget all tokens of a single sequence but the first ones."""
        memory = self._lib.llama_get_memory(self._context)
        removed = self._lib.llama_memory_seq_rm(memory, 0, length, -1)
        assert removed, "a cache of keys and values can be cut anywhere"
        self._past = length

    def feed(self, tokens: Sequence[int], last: int | None = None) -> Tensor:
        """Read more tokens of a single sequence; return logits_TV after the last ones, or all."""
        logits_TV = self.decode([tokens], len(tokens) if last is None else last)
        return torch.from_numpy(logits_TV.copy())

    def decode(self, tokens_BT: Sequence[Sequence[int]], last: int = 1) -> NDArray[np.float32]:
        """Read more tokens of every sequence; return the logits after the last, (B * last, V)."""
        # They are the library's memory: until the next call.
        length = len(tokens_BT[0])
        batch = self._lib.llama_batch_init(len(tokens_BT) * length, 0, 1)
        try:
            batch.n_tokens = len(tokens_BT) * length
            for i in range(batch.n_tokens):
                sequence, offset = divmod(i, length)
                batch.token[i] = tokens_BT[sequence][offset]
                batch.pos[i] = self._past + offset
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = sequence
                batch.logits[i] = offset >= length - last
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status != 0:
            raise ExportError(f"{llama_cpp_version()} failed with status {status}")
        self._past += length
        shape = len(tokens_BT) * last, self.vocabulary
        data = self._ffi.buffer(self._lib.llama_get_logits(self._context), 4 * math.prod(shape))
        return np.frombuffer(data, dtype=np.float32).reshape(shape)


def quantise(source: Path, target: Path, file_type: int) -> None:
    """Write a quantised copy of a .gguf file; its type is a number of the enum llama_ftype."""
    ffi, lib = llama_cpp_library()
    settings = ffi.new("llama_model_quantize_params *")
    settings[0] = lib.llama_model_quantize_default_params()
    settings.ftype = file_type
    status = lib.llama_model_quantize(str(source).encode(), str(target).encode(), settings)
    if status != 0:
        raise ExportError(f"{llama_cpp_version()} cannot quantise the model: {last_error()}")

"""The engine `llama.cpp`, on a .gguf file, through the bindings of llama-cpp-py-sync.

The C functions are called as they are: the package's own `Llama` class asks for the logits and
embeddings of tokens that generation does not need.

Shapes: B sequences, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from cfsp.checkpoint.llama_cpp_library import llama_cpp_library
from cfsp.errors import CheckpointError
from cfsp.speed.gguf_footprint import gguf_footprint
from cfsp.speed.subjects import Subject
from cfsp.speed.workload import Conditions, Timing, Workload


class LlamaCppEngine:
    """Greedy generation with llama.cpp on the CPU.

    Args:
        subject: a .gguf file.
        conditions: threads; device and dtype are the file's and the build's own.
    """

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        self._ffi, self._lib = llama_cpp_library("the engine llama.cpp", "llamacpp")
        path = Path(str(subject.model))
        self.footprint = gguf_footprint(path, head=subject.head)
        self._threads = conditions.threads or os.cpu_count() or 1
        self._model = self._lib.llama_model_load_from_file(
            str(path).encode(), self._lib.llama_model_default_params()
        )
        if self._model == self._ffi.NULL:
            raise CheckpointError(f"llama.cpp cannot load {path}; export the model again")
        self._vocabulary = self._lib.llama_vocab_n_tokens(
            self._lib.llama_model_get_vocab(self._model)
        )
        self._context: Any = self._ffi.NULL
        self._prepared: Workload | None = None
        self.tokens_BN: list[list[int]] = []

    def facts(self) -> dict[str, Any]:
        """Return what the timings hold for."""
        from importlib.metadata import version

        return {
            "engine": "llama.cpp",
            "llama-cpp-py-sync": version("llama-cpp-py-sync"),
            "threads": self._threads,
        }

    def run(self, workload: Workload) -> Timing:
        """Time one prefill and the decoding after it."""
        self._prepare(workload)
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_clear(memory, True)
        prompt_BP = self._prompt(workload)
        start = time.perf_counter()
        tokens_B = self._decode(prompt_BP, 0)
        first = time.perf_counter()
        steps = [tokens_B]
        for step in range(workload.new_tokens):
            tokens_B = self._decode([[token] for token in tokens_B], workload.prompt + step)
            steps.append(tokens_B)
        end = time.perf_counter()
        self.tokens_BN = [list(sequence) for sequence in zip(*steps, strict=True)]
        return Timing(first - start, end - first)

    def peak_device_bytes(self) -> int:
        """Return 0: this engine runs on the CPU."""
        return 0

    def _prepare(self, workload: Workload) -> None:
        """Make a context that holds the workload, unless it is there already."""
        if self._prepared == workload:
            return
        if self._context != self._ffi.NULL:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx = workload.batch * (workload.prompt + workload.new_tokens + 1)
        params.n_batch = workload.batch * workload.prompt
        params.n_seq_max = workload.batch
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if self._context == self._ffi.NULL:
            raise CheckpointError(
                f"llama.cpp has no memory for {workload.describe()}; use a smaller --batch or "
                "--prompt"
            )
        self._prepared = workload

    def _decode(self, tokens_BT: list[list[int]], position: int) -> list[int]:
        """Pass tokens of every sequence and return the next one of each."""
        length = len(tokens_BT[0])
        count = len(tokens_BT) * length
        batch = self._lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for sequence, tokens_T in enumerate(tokens_BT):
                for offset, token in enumerate(tokens_T):
                    i = sequence * length + offset
                    batch.token[i] = token
                    batch.pos[i] = position + offset
                    batch.n_seq_id[i] = 1
                    batch.seq_id[i][0] = sequence
                    batch.logits[i] = offset == length - 1
            status = self._lib.llama_decode(self._context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode returned {status}")
            return [self._argmax((s + 1) * length - 1) for s in range(len(tokens_BT))]
        finally:
            self._lib.llama_batch_free(batch)

    def _argmax(self, index: int) -> int:
        pointer = self._lib.llama_get_logits_ith(self._context, index)
        logits_V = np.frombuffer(self._ffi.buffer(pointer, 4 * self._vocabulary), dtype=np.float32)
        return int(logits_V.argmax())

    def _prompt(self, workload: Workload) -> list[list[int]]:
        generator = np.random.default_rng(0)
        shape = (workload.batch, workload.prompt)
        return generator.integers(self._vocabulary, size=shape).tolist()  # type: ignore[no-any-return]

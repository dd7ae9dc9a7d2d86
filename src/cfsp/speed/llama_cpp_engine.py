"""The engine `llama.cpp`, on a .gguf file, through the bindings of llama-cpp-py-sync.

Shapes: B sequences, P prompt tokens, N new tokens, L blocks.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from cfsp.errors import CheckpointError, ExportError, MissingExtraError
from cfsp.exports.llama_cpp import LlamaCpp
from cfsp.speed.subjects import Subject, random_prompt
from cfsp.speed.work import Conditions, Footprint, ModelWork, Timing, Workload

# llama.cpp keeps keys and values in F16 unless told otherwise.
_CACHE_ITEMSIZE = 2


class LlamaCppEngine:
    """Greedy generation with llama.cpp on the CPU, of a .gguf file; its types are its own."""

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        path = Path(str(subject.model))
        self._threads = conditions.threads or os.cpu_count() or 1
        try:
            self._llama = LlamaCpp(path, None, self._threads)
        except ExportError as error:
            raise CheckpointError(f"{error}; export the model again") from error
        self.footprint = gguf_footprint(path)
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
        prompt_BP = random_prompt(self._llama.vocabulary, workload).tolist()
        start = time.perf_counter()
        steps = [self._llama.decode(prompt_BP).argmax(1)]
        first = time.perf_counter()
        for _ in range(workload.new_tokens):
            steps.append(self._llama.decode(steps[-1][:, None]).argmax(1))
        end = time.perf_counter()
        self.tokens_BN = np.stack(steps, axis=1).tolist()
        return Timing(first - start, end - first)

    def peak_device_bytes(self) -> int:
        """Return 0: this engine runs on the CPU."""
        return 0

    def _prepare(self, workload: Workload) -> None:
        """Make room for the workload, unless it is there already."""
        if self._prepared == workload:
            self._llama.forget()
            return
        tokens = workload.batch * (workload.prompt + workload.new_tokens + 1)
        try:
            self._llama.start(tokens, workload.batch)
        except ExportError as error:
            raise CheckpointError(f"{error}; use a smaller --batch or --prompt") from error
        self._prepared = workload


def gguf_footprint(path: Path) -> Footprint:
    """Return parameters, size and work of a .gguf file, in whatever types it stores."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingExtraError("reading a .gguf file", "gguf") from error
    try:
        reader = GGUFReader(path)
        return Footprint(
            sum(int(tensor.n_elements) for tensor in reader.tensors),
            path.stat().st_size,
            _work(reader),
        )
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF model: {error}") from error


def _work(reader: Any) -> ModelWork:
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    matrices = [
        tensor
        for name, tensor in tensors.items()
        if name.startswith("blk.") and sum(int(n) > 1 for n in tensor.shape) == 2
    ]
    # Tied models have no output tensor: the embedding is read as the head.
    output = tensors.get("output.weight", tensors["token_embd.weight"])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    of = fields["general.architecture"]
    blocks = int(fields[f"{of}.block_count"])
    # One number for all blocks or one for each.
    heads_L = np.broadcast_to(fields[f"{of}.attention.head_count"], blocks)
    groups_L = np.broadcast_to(fields.get(f"{of}.attention.head_count_kv", heads_L), blocks)
    hidden = int(fields[f"{of}.embedding_length"])
    size = int(fields.get(f"{of}.attention.key_length", hidden // int(heads_L.max())))
    return ModelWork(
        block_parameters=sum(int(tensor.n_elements) for tensor in matrices),
        block_bytes=sum(int(tensor.n_bytes) for tensor in matrices),
        head_parameters=int(output.n_elements),
        head_bytes=int(output.n_bytes),
        attention_width=int(heads_L.sum()) * size,
        cache_bytes=2 * int(groups_L.sum()) * size * _CACHE_ITEMSIZE,
    )

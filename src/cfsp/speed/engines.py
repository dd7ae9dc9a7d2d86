"""What runs a model: transformers (eager, growing cache), or llama.cpp.

Shapes: B sequences, P prompt tokens, T tokens at once, N new tokens, L blocks.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cfsp.checkpoint.gguf_import import gguf_reader
from cfsp.checkpoint.llama_cpp import LlamaCpp
from cfsp.checkpoint.loading import cache_argument, compute_device
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import CheckpointError, ExportError
from cfsp.speed.subjects import Subject, build_model
from cfsp.speed.work import Conditions, Footprint, ModelWork, Timing, Workload
from cfsp.streaming.decoder_end import text_model

# llama.cpp keeps keys and values in F16 unless told otherwise.
_CACHE_ITEMSIZE = 2


class Engine(ABC):
    """A loaded model that generates greedily, step by step."""

    footprint: Footprint
    vocabulary: int
    facts: dict[str, Any]  # what the timings hold for: versions, dtype, device, threads
    tokens_BN: Tensor  # that the last run generated

    @torch.inference_mode()
    def run(self, workload: Workload) -> Timing:
        """Time one prefill and the decoding after it."""
        self._prepare(workload)
        prompt_BP = random_prompt(self.vocabulary, workload)
        start = self._now()
        tokens = [self._step(prompt_BP)]
        first = self._now()
        for _ in range(workload.new_tokens):
            tokens.append(self._step(tokens[-1]))
        end = self._now()
        self.tokens_BN = torch.cat(tokens, dim=1)
        return Timing(first - start, end - first)

    def peak_device_bytes(self) -> int:
        """Return the largest memory of an accelerator; 0 on the CPU."""
        return 0

    @abstractmethod
    def _prepare(self, workload: Workload) -> None:
        """Begin all sequences anew, with room for the workload."""

    @abstractmethod
    def _step(self, tokens_BT: Tensor) -> Tensor:
        """Read more tokens of every sequence and return the next of each (B x 1)."""

    def _now(self) -> float:
        return time.perf_counter()


class TransformersEngine(Engine):
    """A transformers model, eager, with a growing cache."""

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        self._device = compute_device(conditions.device)
        self._model, self.footprint = build_model(subject, conditions.dtype, self._device)
        self.vocabulary = vocabulary_of(self._model.config)
        self._forward: Any = text_model(self._model)
        self._cache_argument = cache_argument(self._forward)
        self.facts = {
            "engine": "transformers, eager",
            "torch": torch.__version__,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "attention": self._model.config._attn_implementation,
        }

    def peak_device_bytes(self) -> int:
        """Return the largest memory of an accelerator; 0 on the CPU."""
        if self._device.type == "cpu":
            return 0
        return int(torch.accelerator.max_memory_allocated(self._device))

    def _prepare(self, workload: Workload) -> None:
        from transformers import DynamicCache

        self._position, self._cache = 0, DynamicCache(config=self._model.config)

    def _step(self, tokens_BT: Tensor) -> Tensor:
        tokens_BT = tokens_BT.to(self._device)
        start, self._position = self._position, self._position + tokens_BT.shape[1]
        arguments: dict[str, Any] = {
            "input_ids": tokens_BT,
            "position_ids": torch.arange(start, self._position, device=self._device)[None],
            self._cache_argument: self._cache,
            "use_cache": True,
        }
        output = self._forward(**arguments, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


class LlamaCppEngine(Engine):
    """llama.cpp on the CPU, of a .gguf file; its types are its own."""

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        path, threads = Path(str(subject.model)), torch.get_num_threads()
        try:
            self._llama = LlamaCpp(path, None, threads)
        except ExportError as error:
            raise CheckpointError(f"{error}; export the model again") from error
        self.vocabulary = self._llama.vocabulary
        self.footprint = gguf_footprint(path)
        self._prepared: Workload | None = None
        self.facts = {
            "engine": "llama.cpp",
            "llama-cpp-py-sync": version("llama-cpp-py-sync"),
            "threads": threads,
        }

    def _prepare(self, workload: Workload) -> None:
        if self._prepared == workload:
            self._llama.forget()
            return
        tokens = workload.batch * (workload.prompt + workload.new_tokens + 1)
        try:
            self._llama.start(tokens, workload.batch)
        except ExportError as error:
            raise CheckpointError(f"{error}; use a smaller --batch or --prompt") from error
        self._prepared = workload

    def _step(self, tokens_BT: Tensor) -> Tensor:
        return torch.from_numpy(self._llama.decode(tokens_BT.tolist()).argmax(1))[:, None]


def random_prompt(vocabulary: int, workload: Workload) -> Tensor:
    """Return tokens_BP of a workload, the same each time."""
    shape, generator = (workload.batch, workload.prompt), torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, shape, generator=generator)


def gguf_footprint(path: Path) -> Footprint:
    """Return parameters, size and work of a .gguf file, in whatever types it stores."""
    reader = gguf_reader(path)
    try:
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

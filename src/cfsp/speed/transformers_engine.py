"""The engines `transformers` (eager, growing cache) and `compile` (torch.compile, static cache).

Shapes: B sequences, P prompt tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cfsp.checkpoint.loading import cache_argument, compute_device
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.speed.subjects import Subject, build_model, random_prompt
from cfsp.speed.work import Conditions, Timing, Workload
from cfsp.streaming.decoder_end import text_model

if TYPE_CHECKING:
    from transformers import Cache


class TransformersEngine:
    """Greedy generation with a transformers model, step by step."""

    def __init__(self, subject: Subject, conditions: Conditions) -> None:
        if conditions.threads is not None:
            torch.set_num_threads(conditions.threads)
        self._device = compute_device(conditions.device)
        self._model, self.footprint = build_model(subject, conditions.dtype, self._device)
        self._head = subject.head
        self._compiled = conditions.engine == "compile"
        self._static: dict[Workload, Any] = {}
        module = text_model(self._model) if self._head else self._model.base_model
        self._forward: Callable[..., Any] = (
            torch.compile(module.forward, dynamic=False) if self._compiled else module
        )
        self._cache_argument = cache_argument(module)
        self.tokens_BN: Tensor | None = None

    def facts(self) -> dict[str, Any]:
        """Return what the timings hold for."""
        return {
            "engine": "torch.compile, static cache" if self._compiled else "transformers, eager",
            "torch": torch.__version__,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "attention": self._model.config._attn_implementation,
        }

    def run(self, workload: Workload) -> Timing:
        """Time one prefill and the decoding after it."""
        with torch.inference_mode():
            prompt_BP = random_prompt(vocabulary_of(self._model.config), workload)
            prompt_BP = prompt_BP.to(self._device)
            cache = self._cache(workload)
            self._wait()
            start = time.perf_counter()
            token_B1 = self._step(prompt_BP, cache, 0)
            self._wait()
            first = time.perf_counter()
            tokens = [token_B1]
            for step in range(workload.new_tokens):
                tokens.append(self._step(tokens[-1], cache, workload.prompt + step))
            self._wait()
            end = time.perf_counter()
        self.tokens_BN = torch.cat(tokens, dim=1)
        return Timing(first - start, end - first)

    def peak_device_bytes(self) -> int:
        """Return the largest memory of an accelerator; 0 on the CPU."""
        if self._device.type == "cpu":
            return 0
        return int(torch.accelerator.max_memory_allocated(self._device))

    def _step(self, tokens_BT: Tensor, cache: Cache, position: int) -> Tensor:
        """Return the next token of every sequence."""
        ends = position + tokens_BT.shape[1]
        arguments: dict[str, Any] = {
            "input_ids": tokens_BT,
            "position_ids": torch.arange(position, ends, device=self._device)[None],
            self._cache_argument: cache,
            "use_cache": True,
        }
        if self._head:
            output = self._forward(**arguments, logits_to_keep=1)
            return output.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]
        self._forward(**arguments)
        # Without a head any token does: looking up its embedding costs the same.
        return tokens_BT[:, -1:]

    def _cache(self, workload: Workload) -> Cache:
        from transformers import DynamicCache, StaticCache

        if not self._compiled:
            return DynamicCache(config=self._model.config)
        if workload not in self._static:
            length = workload.prompt + workload.new_tokens
            self._static[workload] = StaticCache(config=self._model.config, max_cache_len=length)
        cache: StaticCache = self._static[workload]
        cache.reset()
        return cache

    def _wait(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)

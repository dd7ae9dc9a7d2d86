"""What can be timed, and what runs it: transformers, eager, with a growing cache.

Each model has a process of its own: its peak memory is then its own, and models can take turns.
That is a model by name, or the config of one that lost something. Prefill is bound by arithmetic,
decoding of few sequences by reading weights and cache. The ideal ratio of two models is therefore
that of the matrices that tokens pass in prefill, and of the bytes of these and of the cache in
decoding. Embedding rows are looked up and cost nothing; attention itself, norms, and matrices
between the blocks and the head (OPT-350M has two) are not counted.

Shapes: B sequences, P prompt tokens, T tokens at once, N new tokens.
"""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from cfsp.checkpoint.loading import cache_argument, compute_device, compute_dtype, load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import LoadedModel, WeightSource
from cfsp.checkpoint.skeleton import build_skeleton
from cfsp.checkpoint.tensor_file import read_weights
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.errors import CfspError
from cfsp.processes import end_with_parent
from cfsp.settings import TimingConditions, Workload
from cfsp.streaming.decoder_end import text_model
from cfsp.streaming.memory import peak_rss_bytes

_INITIAL_RANGE = 0.02
# Other programs that take less of the processors hardly disturb.
HARDLY = 0.05
# A fresh interpreter: a forked one would carry this process's memory.
PROCESSES = multiprocessing.get_context("spawn")
# Not idle, not waiting for a disk, not taken by another virtual machine. Some systems lack some.
_WORK = ("user", "nice", "system", "irq", "softirq")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run of a workload."""

    prefill: float  # until the first new token is known, so also the time to first token
    decode: float  # of all further tokens
    cache_bytes: int = 0  # of keys and values of all sequences at the end
    disturbance: float = 0.0  # fraction of all processors that other programs took meanwhile


@dataclass(frozen=True)
class Footprint:
    """What a model weighs."""

    parameters: int  # tied embeddings count once
    weight_bytes: int  # of the weight files; of the tensors where there is no file
    # Elements of the matrices in the blocks; NaN where experts are routed: it is not known how many
    # of them a token passes.
    block_parameters: float
    head_parameters: int
    itemsize: int  # bytes of each
    fingerprint: str | None = None  # by which a report knows the model; None of random weights

    @staticmethod
    def of(source: WeightSource, weight_bytes: int, itemsize: int) -> Footprint:
        """Return that of a model, from config and shapes."""
        config: Any = text_config_of(source.config)
        blocks = f"{source.architecture.blocks}."
        of_blocks = [
            s.elements
            for n, s in source.parameters.items()
            if n.startswith(blocks) and len(s.shape) >= 2
        ]
        return Footprint(
            source.parameter_count,
            weight_bytes,
            math.nan if source.architecture.has_experts else sum(of_blocks),
            config.vocab_size * config.hidden_size,
            itemsize,
        )

    def prefill_work(self, workload: Workload) -> float:
        """Return how many matrix elements tokens pass; only the last of each passes the head."""
        return workload.batch * (workload.prompt * self.block_parameters + self.head_parameters)

    def decode_work(self, cache_bytes: int) -> float:
        """Return the bytes that are read for one new token of every sequence."""
        return self.itemsize * (self.block_parameters + self.head_parameters) + cache_bytes


@dataclass(frozen=True)
class Subject:
    """One model to time, by name or, with random weights, by config; and what to call it."""

    model: str | Path | PreTrainedConfig
    label: str


def build_model(
    subject: Subject, dtype_name: str, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    """Return the transformers model of a subject and its footprint."""
    if isinstance(subject.model, PreTrainedConfig):
        return _random_model(subject.model, getattr(torch, dtype_name), device)
    checkpoint = open_checkpoint(subject.model)
    dtype = compute_dtype(checkpoint, dtype_name, device)
    model = load(checkpoint.directory, dtype=dtype, device=device)
    # Others may lie there: the same weights again in another format.
    files = {tensor.path for tensor in read_weights(checkpoint.directory).values()}
    size = sum(path.stat().st_size for path in files)
    return model, Footprint.of(checkpoint, size, dtype.itemsize)


def _random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, Footprint]:
    model = build_skeleton(config, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.ndim == 1:
                values.fill_(1.0)
            else:
                values.uniform_(-_INITIAL_RANGE, _INITIAL_RANGE, generator=generator)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.to(device)
    source = LoadedModel(model)
    return model, Footprint.of(source, source.nbytes, dtype.itemsize)


class Engine:
    """A loaded model that generates greedily, step by step."""

    def __init__(self, subject: Subject, conditions: TimingConditions) -> None:
        # MPS, where nothing else is computed, is timed if it is asked for.
        self._device = compute_device(conditions.device, float64=conditions.device == "auto")
        self._model, self.footprint = build_model(subject, conditions.dtype, self._device)
        self._forward: Any = text_model(self._model)
        self._cache_argument = cache_argument(self._forward)
        # What the timings hold for.
        self.facts = {
            "engine": "transformers, eager",
            "torch": torch.__version__,
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "device": str(self._device),
            "threads": torch.get_num_threads(),
            "attention": self._model.config._attn_implementation,
        }

    @torch.inference_mode()
    def run(self, workload: Workload) -> tuple[Timing, Tensor]:
        """Time one prefill and the decoding after it; return also the tokens, BN."""
        cache = DynamicCache(config=self._model.config)
        prompt_BP = random_prompt(vocabulary_of(self._model.config), workload)
        start = self._now()
        tokens = [self._step(prompt_BP, 0, cache)]
        first = self._now()
        for number in range(workload.new_tokens):
            tokens.append(self._step(tokens[-1], workload.prompt + number, cache))
        end = self._now()
        kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        cached = sum(each.nbytes for each in kept if each is not None)
        return Timing(first - start, end - first, cached), torch.cat(tokens, dim=1)

    def peak_device_bytes(self) -> int:
        """Return the largest memory of an accelerator; 0 on the CPU."""
        if self._device.type == "cpu":
            return 0
        return int(torch.accelerator.max_memory_allocated(self._device))

    def _step(self, tokens_BT: Tensor, start: int, cache: Any) -> Tensor:
        """Read more tokens of every sequence and return the next of each (B x 1)."""
        positions_1T = torch.arange(start, start + tokens_BT.shape[1], device=self._device)[None]
        arguments: dict[str, Any] = {
            "input_ids": tokens_BT.to(self._device),
            "position_ids": positions_1T,
            self._cache_argument: cache,
            "use_cache": True,
        }
        output = self._forward(**arguments, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)  # type: ignore[no-any-return]

    def _now(self) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()


def random_prompt(vocabulary: int, workload: Workload) -> Tensor:
    """Return tokens_BP of a workload, the same each time."""
    shape, generator = (workload.batch, workload.prompt), torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, shape, generator=generator)


@dataclass(frozen=True)
class ModelProcess:
    """A process that holds one model; runs happen only when asked for."""

    executor: ProcessPoolExecutor
    footprint: Footprint
    facts: dict[str, Any]  # of the engine
    load_seconds: float  # from start to ready

    def run(self, workload: Workload) -> Timing:
        """Time one run; no other model runs meanwhile."""
        timing: Timing = _asked(self.executor, _run, workload)
        return timing

    def peak_bytes(self) -> tuple[int, int]:
        """Return the peak so far, of host memory (mapped files too) and of an accelerator's."""
        peak: tuple[int, int] = _asked(self.executor, _peak_bytes)
        return peak


@contextmanager
def model_process(subject: Subject, conditions: TimingConditions) -> Iterator[ModelProcess]:
    """Start a process, load the model in it, and end it afterwards; its errors are raised here."""
    # Ctrl-C goes to all processes of a terminal: this one ends the others.
    executor = ProcessPoolExecutor(1, PROCESSES, end_with_parent)
    others = set(multiprocessing.active_children())
    with _interrupts_held_back():
        executor.submit(os.getpid)  # starts it
    try:
        yield ModelProcess(executor, *_asked(executor, _load, subject, conditions))
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # it may be in the middle of a run
        raise
    finally:
        executor.shutdown()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let what is started meanwhile never see Ctrl-C: it would only add a traceback."""
    if sys.platform == "win32":
        yield
        return
    # Starting this helper of multiprocessing would let signals through again.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _asked(executor: ProcessPoolExecutor, ask: Callable[..., Any], *given: Any) -> Any:
    """Return what a function gives in the process; its errors are raised here."""
    try:
        return executor.submit(ask, *given).result()
    except BrokenProcessPool as error:
        raise CfspError(
            "the process that ran the model ended without an answer: for lack of memory, so bench "
            "a smaller model; or, in a script of yours, because what calls cfsp there stands "
            'outside of `if __name__ == "__main__":`'
        ) from error


# The engine of a process that holds one.
_engine: list[Engine] = []


def _load(
    subject: Subject, conditions: TimingConditions
) -> tuple[Footprint, dict[str, Any], float]:
    """Load the model, in the process; return what a `ModelProcess` knows of it."""
    # Runtimes print as they like; standard output is for the results.
    os.dup2(2, 1)
    start = time.perf_counter()
    _engine.append(Engine(subject, conditions))
    took, footprint = time.perf_counter() - start, _engine[0].footprint
    if not isinstance(subject.model, PreTrainedConfig):
        # No part of loading: of every tensor some values are read again.
        footprint = replace(footprint, fingerprint=open_checkpoint(subject.model).fingerprint)
    return footprint, _engine[0].facts, took


def _peak_bytes() -> tuple[int, int]:
    return peak_rss_bytes(), _engine[0].peak_device_bytes()


def _run(workload: Workload) -> Timing:
    # A collection in the middle of a run would be timed with it.
    gc.collect()
    gc.disable()
    busy, cpu, wall = busy_seconds(), time.process_time(), time.perf_counter()
    timing, _ = _engine[0].run(workload)
    own, spent = time.process_time() - cpu, time.perf_counter() - wall
    share = share_of_others(busy_seconds() - busy, own, spent)
    gc.enable()
    return replace(timing, disturbance=share)


def busy_seconds() -> float:
    """Return the CPU seconds that all processors together have worked since the machine began."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in _WORK))


def share_of_others(busy: float, own: float, wall: float) -> float:
    """Return the fraction of all processors that other programs took during a run.

    All processors worked `busy` CPU seconds, the process that ran `own`, in `wall` seconds.
    """
    return max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if wall > 0 else 0.0

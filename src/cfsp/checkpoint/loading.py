"""Loading a whole model, pruned or not, ready to run."""

from __future__ import annotations

import inspect
import logging
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import Module
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import Checkpoint, read_tensors
from cfsp.checkpoint.skeleton import build_skeleton, fill, model_class, tie
from cfsp.errors import ChangedFileError, UsageError, first_line
from cfsp.progress import library_progress
from cfsp.settings import Compute

logger = logging.getLogger(__name__)
_TURN = threading.RLock()


@contextmanager
def _in_turn() -> Iterator[None]:
    """Wait for other threads; calls within a call have its turn."""
    if not _TURN.acquire(blocking=False):
        logger.warning("another thread is in a call of cfsp; this one waits until that ends")
        _TURN.acquire()
    try:
        yield
    finally:
        _TURN.release()


@contextmanager
def multiplying_in(precision: str, matmul: Any) -> Iterator[None]:
    """Let a backend of torch multiply what is in float32 in a precision; it is put back."""
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def torch_as_it_starts() -> Iterator[None]:
    """Compute as in a fresh process, whatever the code around a call has set.

    Autocast would change what is computed without a word; without gradients nothing is trained.
    It keeps the weights that it has cast until the outermost context of its kind ends. This one is
    outermost for all that a call does, so it keeps none: steps would train on those of the first.
    What is in float32 is multiplied in float32, not rounded as many training scripts ask for.
    Whatever draws random numbers afterwards draws those that it would have drawn before. One thread
    at a time: most of what is set here, and where a model is built, is the whole process's.
    """
    with (
        _in_turn(),
        ExitStack() as stack,
        torch.random.fork_rng(()),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        torch.set_default_dtype(torch.float32)
        device = torch.get_default_device()
        accelerator: Any
        for accelerator in (torch.cuda, torch.xpu):
            if accelerator.is_initialized():
                stack.callback(accelerator.set_rng_state_all, accelerator.get_rng_state_all())
            else:  # asking it would take memory there; it begins with the seed of the CPU
                stack.callback(accelerator.manual_seed_all, torch.initial_seed())
        backends: Any = torch.backends
        for matmul in (backends.cuda.matmul, backends.mkldnn.matmul):
            stack.enter_context(multiplying_in("ieee", matmul))
        for kind in {"cpu", compute_device("auto").type}:
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@torch_as_it_starts()
def load(
    name: str | Path, *, dtype: torch.dtype | str = "auto", device: torch.device | str | None = None
) -> PreTrainedModel:
    """Load a model into memory through transformers, in evaluation mode.

    No code of the directory is run: a pruned checkpoint whose blocks differ is built with this
    package's own copy of the modelling file. Nor are kernels of the hub, as transformers does from
    5.25 on: `model.set_use_kernels(True)` takes them. A quantised model is dequantised, as
    pruning does it.

    Args:
        name: a directory, a .gguf file, a hub id, or `demo`.
        dtype: what weights become; `auto` is the dtype in which its FFNs are stored.
        device: where the model goes; None for the CPU.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        UsageError: there is no such dtype, or no such device here.
    """
    if device is not None:
        device = compute_device(device, float64=False)
    checkpoint = open_checkpoint(name)
    known = getattr(torch, str(dtype).removeprefix("torch."), None)
    # Of one byte are formats to store, which modules cannot be built in.
    if isinstance(known, torch.dtype) and known.is_floating_point and known.itemsize > 1:
        dtype = known
    else:
        dtype = named_dtype(checkpoint, str(dtype))
    with library_progress():
        build: Any = model_class(checkpoint.config)
        if checkpoint.quantisation is None:
            # Types that share a model class differ in their configs: EXAONE is a Llama.
            where = checkpoint.directory
            try:
                model: Any = build.from_pretrained(
                    where, config=checkpoint.config, dtype=dtype, use_kernels=False
                )
            except OSError as error:  # its headers were read
                raise ChangedFileError.gone(where, error) from error
        else:
            model = _dequantised_model(checkpoint, dtype)
    if device is not None:
        model = model.to(device)
    return model.eval()


def _dequantised_model(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a quantised checkpoint; one dequantised tensor is read at a time."""
    model = build_skeleton(checkpoint.config, dtype)
    fill(model, read_tensors(model, "", checkpoint, dtype), torch.device("cpu"))
    tie(model, checkpoint.parameters)
    if (checkpoint.directory / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.directory)
    model.config._name_or_path = str(checkpoint.directory)
    return model.requires_grad_(True)


def cache_argument(module: Module) -> str:
    """Return what a model's forward calls its key-value cache.

    transformers 5.24 renamed the argument; older ones know only the old name.
    """
    parameters = inspect.signature(module.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def own_dtype(source: Any) -> torch.dtype:
    """Return the dtype in which the first down projection of a source is stored."""
    unit = source.units[0]
    stored: torch.dtype = source.parameters[
        source.architecture.block_prefix(unit.block) + unit.down
    ].dtype
    return stored


def named_dtype(source: Any, name: str) -> torch.dtype:
    """Return a dtype by name; `auto` is a source's own."""
    if name == "auto":
        return own_dtype(source)
    dtype: torch.dtype = getattr(torch, Compute(dtype=name).dtype)  # which refuses other names
    return dtype


def compute_dtype(source: Any, name: str, device: torch.device) -> torch.dtype:
    """Return what to compute in; `auto` is a source's own dtype, or float32 where that is faster.

    Another one only by its name.
    """
    dtype = named_dtype(source, name)
    return dtype if name != "auto" or is_native(dtype, device) else torch.float32


# How torch asks whether a CPU multiplies a dtype; emulation takes nine times as long as float32.
_NATIVE = {
    torch.bfloat16: ("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    torch.float16: ("_is_amx_fp16_supported",),
}


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a device multiplies numbers of a dtype itself, and does not emulate it."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu" and dtype in _NATIVE:
        return any(getattr(torch.cpu, name, lambda: False)() for name in _NATIVE[dtype])
    return True


def compute_device(name: torch.device | str, *, float64: bool = True) -> torch.device:
    """Return a device, also by its name; `auto` is an accelerator if there is one, else the CPU.

    Sums, losses and repairs are in float64: without it a device is of use to nothing but bench.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or (float64 and found.type == "mps"):
            return torch.device("cpu")
        return found
    if float64 and str(name).partition(":")[0] == "mps":
        raise UsageError(
            "expected a device with float64, in which sums and repairs are computed, found "
            f"{name}, for which torch has none; give --device cpu"
        )
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it computes nothing")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise UsageError(
            f"torch cannot use the device {str(name)!r} here ({first_line(error)}); "
            "choose another --device"
        ) from error
    return device

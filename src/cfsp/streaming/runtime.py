"""Where and in what blocks compute, whether a whole model fits there, and by which software."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch

from cfsp.checkpoint.loading import compute_device, compute_dtype, own_dtype
from cfsp.checkpoint.reading import LoadedModel, WeightSource
from cfsp.errors import CalibrationError, ShortOfMemoryError
from cfsp.processes import Team
from cfsp.settings import Compute
from cfsp.streaming.memory import available_bytes

# A whole model's weights need this much beside them: logits, activations, hidden states.
_ROOM = 1.2


@dataclass(frozen=True)
class Runtime:
    """Where and in what blocks compute, made definite for one model on this machine."""

    device: torch.device
    dtype: torch.dtype
    # Windows that pass a block together; None for about 4096 tokens.
    batch_windows: int | None = None


def runtime_of(compute: Compute, source: WeightSource) -> Runtime:
    """Return what `auto` comes to for a model on this machine."""
    device = compute_device(compute.device)
    return Runtime(device, compute_dtype(source, compute.dtype, device), compute.batch_windows)


def fits(source: WeightSource, runtime: Runtime, models: int = 1) -> bool:
    """Return whether a whole model, or so many as large, fit into memory where it computes."""
    missing = models - is_there(source, runtime)
    return missing * needed_bytes(source, runtime.dtype) <= free_bytes(runtime.device)


def is_there(source: WeightSource, runtime: Runtime) -> bool:
    """Return whether a source is a whole model in memory that computes as fast as a copy would.

    Not one that waits on the CPU where there is an accelerator.
    """
    return (
        isinstance(source, LoadedModel)
        and source.model.device.type == runtime.device.type
        and own_dtype(source).itemsize >= runtime.dtype.itemsize
    )


def check_fits(source: WeightSource, runtime: Runtime, purpose: str) -> None:
    """Check that a whole model fits, for a purpose that the error names."""
    if not fits(source, runtime):
        needed, available = needed_bytes(source, runtime.dtype), free_bytes(runtime.device)
        own = own_dtype(source)
        narrower = f"compute in --dtype {str(own).removeprefix('torch.')}, which takes less, "
        raise ShortOfMemoryError(
            f"{purpose} runs the whole model, which takes about {needed / 1e9:.3g} GB of memory; "
            f"{available / 1e9:.3g} GB are available: free as much, do without, "
            f"{narrower if own.itemsize < runtime.dtype.itemsize else ''}or use a larger machine"
        )


def needed_bytes(source: WeightSource, dtype: torch.dtype) -> int:
    """Return about what a whole model takes in memory."""
    return int(_ROOM * source.parameter_count * dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is available; weights come to a GPU through that of the machine."""
    if device.type != "cuda":
        return available_bytes()
    torch.cuda.empty_cache()  # what torch keeps for the next tensor is free
    on_device, _ = torch.cuda.mem_get_info(device)
    return min(available_bytes(), on_device)


def check_is_number(loss: float, label: str, dtype: torch.dtype) -> None:
    """Check that a loss, or a sum of losses, is not NaN, as it becomes where float16 overflows."""
    if math.isnan(loss):
        raise no_number(f"{label}: the loss is NaN", dtype)


def no_number(what: str, dtype: torch.dtype) -> CalibrationError:
    """Return the error that something is NaN or infinite, and what helps: float16 ends at 65504."""
    cure = "use --dtype float32 or bfloat16"
    if dtype != torch.float16:
        name = str(dtype).removeprefix("torch.")
        cure = (
            f"{name} holds what any sound model computes, so look at its weights or save it again"
        )
    return CalibrationError(f"{what}; {cure}")


@cache  # the metadata of a package is a long text, read and parsed each time
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute, by name."""
    packages = ("cfsp-llm", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def runtime_identity(runtime: Runtime) -> dict[str, Any]:
    """Return what anything that is computed depends on besides model and text, as JSON types."""
    return {
        "device": runtime.device.type,
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "version": {name: versions()[name] for name in ("cfsp-llm", "torch", "transformers")},
    }


def check_same_work(
    team: Team,
    sources: Sequence[WeightSource],
    runtimes: Sequence[Runtime],
    more: Mapping[str, str],
) -> None:
    """Check that all processes have the same models and software, and what else is named.

    And that they compute alike: what `auto` comes to depends on the machine.
    """
    if team.size > 1:
        software = {f"version of {name}": found for name, found in versions().items()}
        models = ", ".join(source.fingerprint for source in sources)
        # By its batches each takes its share of the windows.
        alike = [
            {**runtime_identity(each), "batch-windows": str(each.batch_windows)}
            for each in runtimes
        ]
        flags = ("device", "dtype", "batch-windows")
        computing = {f"--{flag}": ", ".join(each[flag] for each in alike) for flag in flags}
        team.check_same({"model": models, **more, **software, **computing})

"""The check before a model is taken into memory whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.reading import LoadedModel, parameter_count
from cfsp.errors import UsageError
from cfsp.streaming.memory import available_bytes

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime

# The model's weights need this much beside them: logits, activations, hidden states.
_ROOM = 1.2


def fits(source: WeightSource, runtime: Runtime) -> bool:
    """Return whether a whole model fits into the memory that is available where it computes."""
    needed = needed_bytes(source, runtime.dtype)
    return isinstance(source, LoadedModel) or needed <= free_bytes(runtime.device)


def check_fits(source: WeightSource, runtime: Runtime, purpose: str) -> None:
    """Check that a whole model fits into the memory that is available where it computes.

    Args:
        source: the model.
        runtime: where and in what it computes.
        purpose: what needs it, for the error.

    Raises:
        UsageError: it does not.
    """
    needed, available = needed_bytes(source, runtime.dtype), free_bytes(runtime.device)
    if needed > available:
        raise UsageError(
            f"{purpose} runs the whole model, which takes about {needed / 1e9:.3g} GB of memory; "
            f"{available / 1e9:.3g} GB are available: do without, or use a larger machine"
        )


def needed_bytes(source: WeightSource, dtype: torch.dtype) -> int:
    """Return about what a whole model takes in memory."""
    return int(_ROOM * parameter_count(source) * dtype.itemsize)


def free_bytes(device: torch.device) -> int:
    """Return the memory that is available; weights come to a GPU through that of the machine."""
    if device.type != "cuda":
        return available_bytes()
    on_device, _ = torch.cuda.mem_get_info(device)
    return min(available_bytes(), on_device)

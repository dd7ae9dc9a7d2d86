"""Where and in what blocks compute, made definite for one model on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp.checkpoint.loading import compute_device, compute_dtype

if TYPE_CHECKING:
    import torch

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Compute


@dataclass(frozen=True)
class Runtime:
    """Where and in what blocks compute.

    Attributes:
        device: where.
        dtype: in what.
        batch_windows: windows that pass a block together; None for about 4096 tokens.
    """

    device: torch.device
    dtype: torch.dtype
    batch_windows: int | None = None


def runtime_of(compute: Compute, source: WeightSource) -> Runtime:
    """Return what `auto` comes to for a model on this machine.

    Raises:
        UsageError: torch cannot use the device here.
    """
    return Runtime(
        compute_device(compute.device), compute_dtype(source, compute.dtype), compute.batch_windows
    )

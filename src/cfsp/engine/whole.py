"""The check before a model is taken into memory whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import parameter_count
from cfsp.engine.memory import available_bytes
from cfsp.errors import UsageError

if TYPE_CHECKING:
    import torch

    from cfsp.checkpoint.reading import WeightSource

# The model's weights need this much beside them: logits, activations, hidden states.
_ROOM = 1.2


def fits(source: WeightSource, dtype: torch.dtype) -> bool:
    """Return whether a whole model fits into the memory that is available, in this dtype."""
    return needed_bytes(source, dtype) <= available_bytes()


def check_fits(source: WeightSource, dtype: torch.dtype, purpose: str) -> None:
    """Check that a whole model fits into the memory that is available.

    Args:
        source: the model.
        dtype: of its weights in memory.
        purpose: what needs it, for the error.

    Raises:
        UsageError: it does not.
    """
    needed, available = needed_bytes(source, dtype), available_bytes()
    if needed > available:
        raise UsageError(
            f"{purpose} runs the whole model, which takes about {needed / 1e9:.3g} GB of memory; "
            f"{available / 1e9:.3g} GB are available: do without, or use a larger machine"
        )


def needed_bytes(source: WeightSource, dtype: torch.dtype) -> int:
    """Return about what a whole model takes in memory."""
    return int(_ROOM * parameter_count(source) * dtype.itemsize)

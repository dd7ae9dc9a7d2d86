"""The whole model in memory; one that does not fit is refused before it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, parameter_count
from cfsp.engine.memory import available_bytes
from cfsp.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine

# The model's weights need this much beside them: logits, activations, hidden states.
_ROOM = 1.2


def load_whole(source: WeightSource, engine: Engine, purpose: str) -> PreTrainedModel:
    """Return the whole model of a source, ready to run; one in memory is itself.

    Args:
        source: the model.
        engine: where and in what.
        purpose: what needs it, for the error.

    Raises:
        UsageError: it does not fit into memory.
    """
    if isinstance(source, LoadedModel):
        return source.model
    assert isinstance(source, Checkpoint)
    needed = int(_ROOM * parameter_count(source) * engine.dtype.itemsize)
    available = available_bytes()
    if needed > available:
        raise UsageError(
            f"{purpose} runs the whole model, which takes about {needed / 1e9:.3g} GB of memory; "
            f"{available / 1e9:.3g} GB are available: do without, or use a larger machine"
        )
    return load(source.directory, dtype=engine.dtype, device=engine.device)

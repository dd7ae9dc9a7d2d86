"""How any model calls its decoder blocks, learnt by letting it call stand-ins.

The model's own forward runs with every block replaced by a recorder that notes the arguments
it is given and returns the hidden state unchanged. No family's private signature is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.engine.stand_in import StandIn, hidden_state, replaced


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden state that a model passes to one of its blocks."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Call a block as the model would, and return its output hidden state."""
        output = block(hidden_BTD, *self.args, **self.kwargs)
        result = output[0] if isinstance(output, tuple) else output
        assert isinstance(result, Tensor)
        return result

    def for_training(self) -> BlockCall:
        """Return the same call with tensors that autograd accepts, floating ones in float32.

        Those that were recorded in inference mode cannot be saved for a backward pass.
        """
        return BlockCall(_trainable(self.args), _trainable(self.kwargs))


def _trainable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, dict):
        return {key: _trainable(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_trainable(item) for item in value)
    return value


@dataclass
class Recording:
    """What one forward pass through recorders noted."""

    embedded_BTD: Tensor | None = None
    calls: list[BlockCall] = field(default_factory=list)


class AllBlocksRecordedError(Exception):
    """Stops the model's forward after its last block; nothing else raises it."""


class _Recorder(StandIn):
    def __init__(self, original: nn.Module, recording: Recording, is_last: bool) -> None:
        super().__init__(original)
        self._recording = recording
        self._is_last = is_last

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden_BTD = hidden_state(args, kwargs)
        if "hidden_states" in kwargs:
            del kwargs["hidden_states"]
        else:
            args = args[1:]
        if self._recording.embedded_BTD is None:
            self._recording.embedded_BTD = hidden_BTD
        self._recording.calls.append(BlockCall(args, kwargs))
        if self._is_last:
            raise AllBlocksRecordedError
        return hidden_BTD


@contextmanager
def recorded_blocks(blocks: nn.ModuleList) -> Iterator[Recording]:
    """Replace the blocks by recorders; put them back afterwards."""
    recording, count = Recording(), len(blocks)

    def recorder(index: int, original: nn.Module) -> nn.Module:
        return _Recorder(original, recording, is_last=index == count - 1)

    with replaced(blocks, count, recorder):
        yield recording


def record_calls(base_model: nn.Module, blocks: nn.ModuleList, tokens_BT: Tensor) -> Recording:
    """Run a model's embeddings and masks on tokens; note how it would call its blocks.

    Args:
        base_model: the model without its head; needs weights for all but its blocks.
        blocks: its list of decoder blocks.
        tokens_BT: token ids.

    Returns:
        The embedded tokens and one call for each block.
    """
    with recorded_blocks(blocks) as recording:
        try:
            base_model(input_ids=tokens_BT, use_cache=False)
        except AllBlocksRecordedError:
            pass
        else:
            raise AssertionError("the model's forward did not reach its last block")
    return recording

"""How any model calls its decoder blocks, learnt by letting it call stand-ins.

The model's own forward runs with every block replaced by a recorder that notes the arguments
it is given and returns the hidden state unchanged. No family's private signature is needed.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.activations import hidden_state
from cfsp.streaming.call_form import PLAIN, PLAIN_LAYOUT, CallForm, HiddenLayout
from cfsp.streaming.call_values import Place, with_values
from cfsp.streaming.stand_in import StandIn, replaced, without_hidden_state


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden state that a model passes to one of its blocks.

    Attributes:
        args: after the hidden state, if that is the first.
        kwargs: by their names.
        layout: how the model has its hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layout: HiddenLayout = PLAIN_LAYOUT

    def __call__(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Call a block as the model would, and return its output hidden state."""
        return self.hidden_of(self.output_of(block, hidden_BTD))

    def output_of(self, block: nn.Module, hidden_BTD: Tensor) -> Any:
        """Call a block as the model would, and return all that it returns."""
        return block(self.layout.unpack(hidden_BTD), *self.args, **self.kwargs)

    def hidden_of(self, output: Any) -> Tensor:
        """Return the hidden state in what a block returned."""
        hidden = output[0] if isinstance(output, tuple | list) else output
        assert isinstance(hidden, Tensor)
        return self.layout.pack(hidden)

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as one value, in which every part has its place."""
        return self.args, self.kwargs

    def with_values(self, values: Mapping[Place, Any]) -> BlockCall:
        """Return the same call with other values in some places of its arguments."""
        if not values:
            return self
        args, kwargs = with_values(self.arguments, values)
        return BlockCall(args, kwargs, self.layout)

    def for_training(self) -> BlockCall:
        """Return the same call with tensors that autograd accepts, floating ones in float32.

        Those that were recorded in inference mode cannot be saved for a backward pass.
        """
        return BlockCall(_trainable(self.args), _trainable(self.kwargs), self.layout)


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
    # Hidden states as they enter each block.
    entering_L: list[Tensor] = field(default_factory=list)


class AllBlocksRecordedError(Exception):
    """Stops the model's forward after its last block; nothing else raises it."""


class _Recorder(StandIn):
    def __init__(
        self,
        original: nn.Module,
        recording: Recording,
        form: CallForm,
        is_last: bool,
        returns_zeros: bool,
    ) -> None:
        super().__init__(original)
        self._recording = recording
        self._form = form
        self._is_last = is_last
        self._returns_zeros = returns_zeros

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_state(args, kwargs)
        args, kwargs = without_hidden_state(args, kwargs)
        layout = self._form.layout
        self._recording.entering_L.append(layout.pack(hidden))
        if self._recording.embedded_BTD is None:
            self._recording.embedded_BTD = self._recording.entering_L[0]
        self._recording.calls.append(BlockCall(args, kwargs, layout))
        if self._is_last:
            raise AllBlocksRecordedError
        return self._form.returned(torch.zeros_like(hidden) if self._returns_zeros else hidden)


@contextmanager
def recorded_blocks(
    blocks: nn.ModuleList, form: CallForm = PLAIN, *, returns_zeros: bool = False
) -> Iterator[Recording]:
    """Replace the blocks by recorders; put them back afterwards."""
    recording, count = Recording(), len(blocks)

    def recorder(index: int, original: nn.Module) -> nn.Module:
        return _Recorder(original, recording, form, index == count - 1, returns_zeros)

    with replaced(blocks, count, recorder):
        yield recording


def record_calls(
    decoder: nn.Module,
    blocks: nn.ModuleList,
    tokens_BT: Tensor,
    form: CallForm = PLAIN,
    *,
    more: Mapping[str, Any] | None = None,
    returns_zeros: bool = False,
) -> Recording:
    """Run a model's embeddings and masks on tokens; note how it would call its blocks.

    Args:
        decoder: the module whose forward takes token ids and calls the blocks; needs weights for
            all but its blocks.
        blocks: its list of decoder blocks.
        tokens_BT: token ids.
        form: how it takes hidden states from its blocks.
        more: what else the forward is given, such as pixel values.
        returns_zeros: whether recorders return zeros instead of the hidden state.

    Returns:
        The embedded tokens and one call for each block.
    """
    with recorded_blocks(blocks, form, returns_zeros=returns_zeros) as recording:
        try:
            decoder(input_ids=tokens_BT, use_cache=False, **(more or {}))
        except AllBlocksRecordedError:
            pass
        else:
            raise AssertionError("the model's forward did not reach its last block")
    return recording

"""What a multimodal model does with images and text before the first block of its decoder.

The model's own forward runs with stand-ins for blocks: vision tower, projector, the places of image
features among those of tokens, positions in two dimensions, masks in which an image sees all of
itself. What enters the first block, and how blocks are called, is kept window by window.

Some models add features of images to what leaves their first blocks as well. That is seen by
letting stand-ins return zeros, and proved to be an addition by what else they return.

Shapes: N windows, B windows in a batch (here one), T tokens, D hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.errors import UnsupportedModelError
from cfsp.streaming.block_calls import BlockCalls
from cfsp.streaming.call_form import CallForm
from cfsp.streaming.call_recorder import Recording, record_calls
from cfsp.streaming.hidden_states import HiddenStates

if TYPE_CHECKING:
    from cfsp.text.windows import Windows


class ImageStart:
    """What a multimodal model does before the first block of its decoder.

    Args:
        model: needs weights for all but its blocks.
        blocks: its list of decoder blocks.
        form: how the decoder takes hidden states from its blocks.
        device: where to compute.
        dtype: what to compute in.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        form: CallForm,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._blocks, self._form = model, blocks, form
        self._device, self._dtype = device, dtype

    def embed(
        self,
        windows: Windows,
        open_hidden: Callable[[tuple[int, ...]], HiddenStates],
        *,
        resumed: bool = False,
    ) -> tuple[HiddenStates, BlockCalls]:
        """Return the hidden states, and how blocks are called with each window.

        Args:
            windows: with images and without.
            open_hidden: makes room for the hidden states, from their shape NTD; if resumed, it
                gives those that enter a later block.
            resumed: whether the hidden states are there. Calls are recorded again.

        Raises:
            UnsupportedModelError: blocks cannot be run one after the other.
        """
        hidden: HiddenStates | None = None
        calls: BlockCalls | None = None
        for window in range(len(windows.tokens_NT)):
            recording = self._record(windows, window)
            embedded_BTD = recording.entering_L[0]
            if hidden is None or calls is None:
                hidden = open_hidden((*windows.tokens_NT.shape, embedded_BTD.shape[-1]))
                calls = BlockCalls(recording.calls, recording.calls)
            if not resumed:
                hidden.write(slice(window, window + 1), embedded_BTD)
            calls.add_alone(window, recording.calls, self._added(windows, window, recording))
        assert hidden is not None and calls is not None
        return hidden, calls

    def _record(self, windows: Windows, window: int, *, returns_zeros: bool = False) -> Recording:
        """Return what enters each block, and how it is called, with one window."""
        more = {
            name: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for name, value in windows.images_of(window).items()
        }
        tokens_BT = windows.tokens_NT[window : window + 1].to(self._device)
        return record_calls(
            self._model, self._blocks, tokens_BT, self._form, more=more, returns_zeros=returns_zeros
        )

    def _added(self, windows: Windows, window: int, recording: Recording) -> dict[int, Tensor]:
        """Return what the model adds to what leaves a block before it enters the next, 1TD.

        Args:
            windows: all of them.
            window: number of one.
            recording: of it, with stand-ins that leave hidden states as they are.

        Returns:
            By the index of the block that it enters; mostly nothing.

        Raises:
            UnsupportedModelError: the model does something else there than to add.
        """
        entering_L = recording.entering_L
        if all(torch.equal(entering_L[0], each) for each in entering_L[1:]):
            return {}
        added_L = self._record(windows, window, returns_zeros=True).entering_L
        for index in range(1, len(entering_L)):
            if not torch.equal(entering_L[index - 1] + added_L[index], entering_L[index]):
                raise UnsupportedModelError(
                    f"with images the model changes the hidden states between blocks {index - 1} "
                    f"and {index} ({type(self._blocks[0]).__name__}) by more than an addition, so "
                    "that blocks cannot be run one after the other; calibrate on text alone"
                )
        return {index: each for index, each in enumerate(added_L) if index and bool(each.any())}

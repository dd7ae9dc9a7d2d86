"""The part of a decoder before its first block: what enters the blocks, and how they are called.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from inspect import signature

import torch
from torch import Tensor, nn

from cfsp.errors import UnsupportedModelError
from cfsp.streaming.block_calls import BlockCalls
from cfsp.streaming.call_form import CallForm, find_call_form
from cfsp.streaming.call_recorder import Recording, record_calls
from cfsp.streaming.hidden_states import HiddenStates


class DecoderStart:
    """What a decoder does before its first block.

    Args:
        decoder: the module whose forward takes token ids and calls the blocks; needs weights for
            all but its blocks.
        blocks: its list of decoder blocks.
        device: where to compute.
    """

    def __init__(self, decoder: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
        self._decoder, self._blocks, self._device = decoder, blocks, device

    @cached_property
    def form(self) -> CallForm:
        """How the decoder takes hidden states from its blocks.

        Raises:
            UnsupportedModelError: they cannot be run one after the other.
        """
        if "input_ids" not in signature(self._decoder.forward).parameters:
            raise UnsupportedModelError(
                f"{type(self._decoder).__name__}, which calls the blocks, takes no token ids; "
                "expected a decoder that begins with its own embeddings"
            )

        def run(tokens_BT: Tensor) -> Tensor:
            output: Tensor = self._decoder(input_ids=tokens_BT, use_cache=False)[0]
            return output

        return find_call_form(run, self._blocks, self._device)

    def record(self, tokens_BT: Tensor) -> Recording:
        """Return what enters the first block, and how the blocks are called."""
        return record_calls(self._decoder, self._blocks, tokens_BT.to(self._device), self.form)

    def embed(
        self,
        tokens_NT: Tensor,
        batches: Iterable[slice],
        open_hidden: Callable[[tuple[int, ...]], HiddenStates],
        *,
        resumed: bool = False,
    ) -> tuple[HiddenStates, BlockCalls]:
        """Return the hidden states, and how blocks are called with the windows.

        Windows are never padded, so the calls depend on the shape of a batch, and in some models
        on the tokens. A resumed pass has its hidden states already.

        Args:
            tokens_NT: windows.
            batches: which of them pass together.
            open_hidden: makes room for the hidden states, from their shape NTD; if resumed, it
                gives those that enter a later block.
            resumed: whether the hidden states are there.

        Raises:
            UnsupportedModelError: blocks cannot be run one after the other.
        """
        one_BT = tokens_NT[:1]
        # Other tokens of the same text: what is different then is made from them.
        other_BT = tokens_NT.flatten().roll(1)[: one_BT.numel()].view_as(one_BT)
        calls = BlockCalls(self.record(one_BT).calls, self.record(other_BT).calls)
        hidden: HiddenStates | None = None
        for batch in batches:
            windows = range(batch.start, batch.stop)
            if resumed and len(windows) in calls and not calls.depend_on_text:
                continue
            recording = self.record(tokens_NT[batch])
            embedded_BTD = recording.embedded_BTD
            assert embedded_BTD is not None
            if hidden is None:
                hidden = open_hidden((*tokens_NT.shape, embedded_BTD.shape[-1]))
            if not resumed:
                hidden.write(batch, embedded_BTD)
            calls.add(windows, recording.calls)
        assert hidden is not None
        return hidden, calls

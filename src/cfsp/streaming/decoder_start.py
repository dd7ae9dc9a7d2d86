"""What a model does before its first block: what enters the blocks, and how they are called.

Of text the decoder's own forward runs with stand-ins for blocks. Of windows with images that of the
whole model does: vision tower, projector, the places of image features among those of tokens,
positions in two dimensions, masks in which an image sees all of itself; calls are then kept window
by window. Some models add features of images to what leaves their first blocks as well. That is
seen by letting stand-ins return zeros, and proved to be an addition by what else they return.

Shapes: N windows, B windows in a batch, T tokens, D hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.checkpoint.skeleton import fill, read_tensors, unload
from cfsp.errors import UnsupportedModelError
from cfsp.streaming.block_calls import BlockCalls, Recording, record_calls
from cfsp.streaming.call_form import find_call_form
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.stand_in import CallForm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime
    from cfsp.text.windows import Windows

# Makes room for hidden states, from their shape NTD; of a resumed pass it gives those that enter a
# later block.
Room = Callable[[tuple[int, ...]], HiddenStates]


class DecoderStart:
    """What a decoder does before its first block.

    Args:
        decoder: the module whose forward takes token ids and calls the blocks; needs weights for
            all but its blocks.
        blocks: its list of decoder blocks.
        device: where to compute.
    """

    def __init__(self, decoder: nn.Module, blocks: nn.ModuleList, device: torch.device) -> None:
        self._decoder, self.blocks, self.device = decoder, blocks, device

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

        return find_call_form(run, self.blocks, self.device)

    def record(self, tokens_BT: Tensor) -> Recording:
        """Return what enters the blocks, and how they are called."""
        return record_calls(self._decoder, self.blocks, tokens_BT.to(self.device), self.form)

    def embed(
        self, tokens_NT: Tensor, batches: Iterable[slice], room: Room, *, resumed: bool = False
    ) -> tuple[HiddenStates, BlockCalls]:
        """Return the hidden states, and how blocks are called with batches of windows.

        Windows are never padded, so the calls depend on the shape of a batch, and in some models
        on the tokens. A resumed pass has its hidden states already.

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
            embedded_BTD = recording.entering_L[0]
            if hidden is None:
                hidden = room((*tokens_NT.shape, embedded_BTD.shape[-1]))
            if not resumed:
                hidden.write(batch, embedded_BTD)
            calls.add(windows, recording.calls)
        assert hidden is not None
        return hidden, calls


def embed_with_images(
    start: DecoderStart,
    model: nn.Module,
    windows: Windows,
    room: Room,
    dtype: torch.dtype,
    *,
    resumed: bool = False,
) -> tuple[HiddenStates, BlockCalls]:
    """Return the hidden states, and how blocks are called with each window.

    Args:
        start: of its decoder.
        model: the multimodal model; needs weights for all but its blocks.
        windows: with images and without.
        room: for the hidden states.
        dtype: of what the model is given besides tokens, where that is floating.
        resumed: whether the hidden states are there. Calls are recorded again.

    Raises:
        UnsupportedModelError: blocks cannot be run one after the other.
    """

    def record(window: int, *, returns_zeros: bool = False) -> Recording:
        more = {
            name: value.to(start.device, dtype if value.is_floating_point() else None)
            for name, value in windows.images_of(window).items()
        }
        tokens_BT = windows.tokens_NT[window : window + 1].to(start.device)
        return record_calls(
            model, start.blocks, tokens_BT, start.form, more=more, returns_zeros=returns_zeros
        )

    hidden: HiddenStates | None = None
    calls: BlockCalls | None = None
    for window in range(len(windows.tokens_NT)):
        recording = record(window)
        entering_L, added_L = recording.entering_L, {}
        if hidden is None or calls is None:
            hidden = room((*windows.tokens_NT.shape, entering_L[0].shape[-1]))
            calls = BlockCalls(recording.calls, recording.calls)
        if not resumed:
            hidden.write(slice(window, window + 1), entering_L[0])
        if not all(torch.equal(entering_L[0], each) for each in entering_L[1:]):
            name = type(start.blocks[0]).__name__
            added_L = _added(entering_L, record(window, returns_zeros=True).entering_L, name)
        calls.add_alone(window, recording.calls, added_L)
    assert hidden is not None and calls is not None
    return hidden, calls


def _added(
    entering_L: Sequence[Tensor], of_zeros_L: Sequence[Tensor], name: str
) -> dict[int, Tensor]:
    """Return what the model adds to what leaves a block, 1TD, by the index of the next block.

    Args:
        entering_L: what enters blocks that leave the hidden state as it is.
        of_zeros_L: what enters blocks that return zeros.
        name: of the blocks' class.

    Raises:
        UnsupportedModelError: the model does something else there than to add.
    """
    for index in range(1, len(entering_L)):
        if not torch.equal(entering_L[index - 1] + of_zeros_L[index], entering_L[index]):
            raise UnsupportedModelError(
                f"with images the model changes the hidden states between blocks {index - 1} "
                f"and {index} ({name}) by more than an addition, so that blocks cannot be run one "
                "after the other; calibrate on text alone"
            )
    return {index: each for index, each in enumerate(of_zeros_L) if index and bool(each.any())}


@contextmanager
def weights_of_start(
    skeleton: PreTrainedModel, source: WeightSource, runtime: Runtime, *, has_images: bool
) -> Iterator[None]:
    """Read everything of a model that comes before its blocks, and drop it afterwards.

    Images pass the vision tower, which is not part of the decoder.
    """
    architecture = source.architecture
    path, not_needed = architecture.decoder, [architecture.blocks]
    if has_images:
        not_needed += _heads(skeleton, path)
        path = ""
    module, prefix = skeleton.get_submodule(path), f"{path}." if path else ""
    with _without(skeleton, not_needed):
        fill(module, read_tensors(module, prefix, source, runtime.dtype), runtime.device)
    yield
    with _without(skeleton, not_needed):
        unload(module)


def _heads(model: PreTrainedModel, decoder: str) -> Iterator[str]:
    """Yield the path to the module that gives logits, if it is outside the decoder."""
    head: Any = model.get_output_embeddings()
    for path, module in model.named_modules():
        if module is head and not f"{path}.".startswith(f"{decoder}." if decoder else ""):
            yield path


@contextmanager
def _without(model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
    """Leave parts of a model out while this is open."""
    left_out = {path: model.get_submodule(path) for path in paths}
    for path in paths:
        model.set_submodule(path, nn.ModuleList())
    try:
        yield
    finally:
        for path, module in left_out.items():
            model.set_submodule(path, module)

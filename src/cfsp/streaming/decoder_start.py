"""What a model does before its first block: what enters the blocks, and how they are called.

Of text the decoder's own forward runs with stand-ins for blocks. Of windows with images that of the
whole model does, vision tower and projector included; calls are then kept window by window. Some
models add features of images to what leaves their first blocks as well.

Shapes: N windows, B windows in a batch, T tokens, D hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.checkpoint.reading import read_tensors
from cfsp.checkpoint.skeleton import fill, unload
from cfsp.errors import UnsupportedModelError
from cfsp.streaming.block_calls import BlockCalls, Recording, record_calls
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.stand_in import CallForm, find_call_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime
    from cfsp.text.windows import Windows

# Makes room for hidden states, from their shape NTD; of a resumed pass it gives those that enter a
# later block.
Room = Callable[[tuple[int, ...]], HiddenStates]


@dataclass
class DecoderStart:
    """What a model does before its first block; it needs weights for all but its blocks."""

    decoder: nn.Module
    blocks: nn.ModuleList
    runtime: Runtime
    multimodal: nn.Module | None = None  # the whole model, where windows have images

    @cached_property
    def form(self) -> CallForm:
        """How the decoder takes hidden states from its blocks."""
        return find_call_form(
            lambda tokens_BT: self.decoder(input_ids=tokens_BT, use_cache=False)[0],
            self.blocks,
            self.runtime.device,
        )

    def record(
        self,
        tokens_BT: Tensor,
        images: Mapping[str, Tensor] | None = None,
        *,
        returns_zeros: bool = False,
    ) -> Recording:
        """Return what enters the blocks, and how they are called; `images` are of one window."""
        device, dtype = self.runtime.device, self.runtime.dtype
        more = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in (images or {}).items()
        }
        model = self.multimodal or self.decoder
        tokens_BT = tokens_BT.to(device)
        return record_calls(model, self.blocks, tokens_BT, self.form, more, returns_zeros)

    def embed(
        self, windows: Windows, batches: Iterable[slice], room: Room, *, resumed: bool = False
    ) -> tuple[HiddenStates, BlockCalls]:
        """Return the hidden states, and how blocks are called with batches of windows.

        Windows are never padded, so the calls depend on the shape of a batch, and in some models
        on the tokens; with images, on the window. A resumed pass has its hidden states already.
        """
        tokens_NT = windows.tokens_NT
        hidden: HiddenStates | None = None
        calls: BlockCalls | None = None
        for batch in batches:
            own, tokens_BT = range(batch.start, batch.stop), tokens_NT[batch]
            if self.multimodal is not None:
                images = windows.images_of(batch.start)
                recording = self.record(tokens_BT, images)
                calls = calls or BlockCalls(recording.calls, recording.calls)
                added_L = self._added(tokens_BT, images, recording)
                calls.add_alone(batch.start, recording.calls, added_L)
            else:
                calls = calls or self._calls_of_text(tokens_NT)
                if resumed and len(own) in calls and not calls.depend_on_text:
                    continue
                recording = self.record(tokens_BT)
                calls.add(own, recording.calls)
            if hidden is None:
                hidden = room((*tokens_NT.shape, recording.entering_L[0].shape[-1]))
            if not resumed:
                hidden.write(batch, recording.entering_L[0])
        assert hidden is not None and calls is not None
        return hidden, calls

    def _calls_of_text(self, tokens_NT: Tensor) -> BlockCalls:
        """Return the calls of the first window, and what differs with other tokens."""
        one_BT = tokens_NT[:1]
        # Other tokens of the same text: what is different then is made from them.
        other_BT = tokens_NT.flatten().roll(1)[: one_BT.numel()].view_as(one_BT)
        return BlockCalls(self.record(one_BT).calls, self.record(other_BT).calls)

    def _added(
        self, tokens_BT: Tensor, images: Mapping[str, Tensor], recording: Recording
    ) -> dict[int, Tensor]:
        """Return what the model adds to what leaves a block, 1TD, by the index of the next block.

        Mostly nothing. It shows where stand-ins that return zeros are compared with a recording of
        those that leave the hidden state as it is; all but an addition is refused.
        """
        entering_L = recording.entering_L
        if all(torch.equal(entering_L[0], each) for each in entering_L[1:]):
            return {}
        added_L = self.record(tokens_BT, images, returns_zeros=True).entering_L
        for index in range(1, len(entering_L)):
            if not torch.equal(entering_L[index - 1] + added_L[index], entering_L[index]):
                raise UnsupportedModelError(
                    f"with images the model changes the hidden states between blocks {index - 1} "
                    f"and {index} ({type(self.blocks[0]).__name__}) by more than an addition, so "
                    "that blocks cannot be run one after the other; calibrate on text alone"
                )
        return {index: each for index, each in enumerate(added_L) if index and bool(each.any())}


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

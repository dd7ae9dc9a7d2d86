"""The engine: windows flow through a model one block at a time.

All windows pass block 0, then block 1, and so on. Only the embeddings (at the start), one
block, the next one (which a thread reads meanwhile) and the hidden states are in memory, so the
model may be far larger than memory.

Shapes: N windows, B windows in a batch, T tokens, D hidden, F FFN channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp.architecture.activations import OnOutput, observed_activations, observed_sublayers
from cfsp.checkpoint.reading import read_tensors
from cfsp.checkpoint.skeleton import (
    blocks_of,
    build_skeleton,
    fill,
    unload,
)
from cfsp.errors import CalibrationError
from cfsp.streaming.block_calls import BlockCalls
from cfsp.streaming.call_recorder import BlockCall
from cfsp.streaming.decoder_start import DecoderStart
from cfsp.streaming.hidden_states import HiddenInMemory, HiddenStates
from cfsp.streaming.image_start import ImageStart
from cfsp.streaming.pass_times import PassTimes
from cfsp.streaming.read_ahead import read_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.architecture.found import Unit
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime
    from cfsp.text.windows import Windows

# Batches of about this many tokens: large enough for full speed, small enough for a cache.
TOKENS_IN_BATCH = 4096

OnActivations = Callable[[int, int, Tensor, Tensor], None]
OnHidden = Callable[[Tensor, Tensor], None]
OnSublayer = Callable[[int, Tensor, Tensor], None]
OpenHidden = Callable[[tuple[int, ...], torch.dtype], HiddenStates]


@dataclass
class StreamedBlock:
    """One decoder block with its weights, and the windows that are about to pass it.

    Attributes:
        index: position in the model.
        module: the decoder block.
        units: its units; a block may have none.
        hidden: what enters the block, and after `advance` what leaves it.
        device: where the block computes.
    """

    index: int
    module: nn.Module
    units: tuple[Unit, ...]
    hidden: HiddenStates
    device: torch.device
    _batches: list[slice]
    _calls: BlockCalls
    _on_batch: Callable[[int], None]
    _times: PassTimes

    def advance(
        self,
        on_activations: OnActivations | None = None,
        on_hidden: OnHidden = lambda input_BTD, output_BTD: None,
        on_sublayer: OnSublayer | None = None,
        on_output: OnOutput | None = None,
    ) -> None:
        """Let all windows pass the block; the hidden states become its outputs.

        The block's weights are dropped then: what comes after may need the memory.

        Args:
            on_activations: is given the position of an FFN unit among those of the block, the
                index of an FFN in the unit, rows of the input of its down projection (act_RF, see
                `observed_activations`), and which window each row is of; None where nobody looks.
            on_hidden: is given the block's input and output hidden states, both BTD.
            on_sublayer: is given the position of an attention among the block's units, the block's
                input and the hidden state after the attention, both BTD, where it can be seen.
            on_output: is given what experts add, see `observed_activations`; looks only beside
                `on_activations`.
        """
        after: dict[int, Tensor] = {}
        first_window, seqlen = 0, 1
        if not any(unit.removable_experts for unit in self.units):
            on_output = None  # to look costs a product for each expert

        def on_rows(unit: int, ffn: int, act_RF: Tensor, token_R: Tensor) -> None:
            assert on_activations is not None
            on_activations(unit, ffn, act_RF, first_window + token_R // seqlen)

        with (
            nullcontext()
            if on_activations is None or not self.units
            else observed_activations(self.module, self.units, on_rows, on_output),
            nullcontext()
            if on_sublayer is None
            else observed_sublayers(self.module, self.units, after),
        ):
            for batch in self._batches:
                with self._times.part("hidden_states"):
                    input_BTD = self._moved(self.hidden.read(batch))
                windows = range(batch.start, batch.stop)
                input_BTD = self._calls.entering(self.index, windows, input_BTD)
                first_window, seqlen = batch.start, input_BTD.shape[1]
                output_BTD = self.compute(batch, input_BTD)
                on_hidden(input_BTD, output_BTD)
                while after:
                    position, after_BTD = after.popitem()
                    assert on_sublayer is not None
                    on_sublayer(position, input_BTD, after_BTD)
                self._write(batch, output_BTD)
                self._on_batch(input_BTD.shape[0] * input_BTD.shape[1])
        self.hidden.turn()
        unload(self.module)

    def compute(self, batch: slice, input_BTD: Tensor) -> Tensor:
        """Return what the block makes of some windows, called as the model calls it."""
        windows = range(batch.start, batch.stop)
        return self._calls.compute(self.index, self.module, windows, input_BTD)

    def call(self, index: int, windows: int) -> BlockCall:
        """Return how the model calls one of its blocks with any batch of so many windows.

        Raises:
            UnsupportedModelError: its calls differ from window to window.
        """
        return self._calls.of(index, windows)

    @property
    def leaves_more(self) -> bool:
        """Whether later blocks need more of this one than the hidden states that leave it."""
        return self._calls.carry(self.index)

    def pass_through(
        self, compute: Callable[[slice, Tensor], Tensor], batches: Iterable[slice]
    ) -> None:
        """Let some windows pass a function in this block's place; `hidden.turn` ends the block.

        Args:
            compute: gives what leaves it, from the windows of a batch and what enters (BTD).
            batches: the windows.
        """
        for batch in batches:
            with self._times.part("hidden_states"):
                input_BTD = self._moved(self.hidden.read(batch))
            self._write(batch, compute(batch, input_BTD))

    def _moved(self, hidden_BTD: Tensor) -> Tensor:
        """Return hidden states where the block computes.

        A GPU may copy them when it gets there: `write` waits for what it computes from them.
        """
        return hidden_BTD.to(self.device, non_blocking=self.device.type == "cuda")

    def _write(self, batch: slice, output_BTD: Tensor) -> None:
        """Set what leaves the block; the time that a GPU still computes is not that of writing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        with self._times.part("hidden_states"):
            self.hidden.write(batch, output_BTD)

    def tokens_done(self, tokens: int) -> None:
        """Report progress where `advance` does not."""
        self._on_batch(tokens)


def windows_in_batch(windows: Windows, batch_windows: int | None) -> int:
    """Return how many windows pass a block together.

    Args:
        windows: all of them. Where some have images, each passes alone: how a model calls its
            blocks then differs from window to window.
        batch_windows: how many are asked for; None for about 4096 tokens.
    """
    if windows.has_images:
        return 1
    return batch_windows or max(1, TOKENS_IN_BATCH // windows.tokens_NT.shape[1])


def stream_blocks(
    source: WeightSource,
    windows: Windows,
    runtime: Runtime,
    *,
    on_batch: Callable[[int], None] = lambda tokens: None,
    open_hidden: OpenHidden = HiddenInMemory,
    first_block: int = 0,
    more_batch_sizes: Iterable[int] = (),
    times: PassTimes | None = None,
) -> Iterator[StreamedBlock]:
    """Yield every block in turn; the caller must `advance` each before it asks for the next.

    Args:
        source: the model.
        windows: without padding.
        runtime: where and in what blocks compute, and how many windows pass together.
        on_batch: is told how many tokens have passed a block, after each batch.
        open_hidden: makes room for the hidden states, from their shape NTD and dtype.
        first_block: the block to begin with; if it is not 0, `open_hidden` gives the states
            that enter it.
        more_batch_sizes: numbers of windows that blocks are called with besides those of batches.
        times: is told what the time went into.

    Raises:
        CalibrationError: a weight is NaN or infinite.
        CheckpointError: a tensor is missing.
        UnsupportedModelError: blocks cannot be run one after the other.
    """
    times = times or PassTimes()
    tokens_NT, architecture = windows.tokens_NT, source.architecture
    device, dtype = runtime.device, runtime.dtype
    size = windows_in_batch(windows, runtime.batch_windows)
    batches = [slice(i, min(i + size, len(tokens_NT))) for i in range(0, len(tokens_NT), size)]
    skeleton = build_skeleton(source.config, dtype)
    blocks = blocks_of(skeleton, architecture)
    # While a thread reads the first of them, stand-ins take their places in the model.
    modules = list(blocks)
    needed, not_needed = architecture.decoder, [architecture.blocks]
    if windows.has_images:
        # They pass the vision tower, which is not part of the decoder.
        needed, not_needed = "", [architecture.blocks, *_heads(skeleton, architecture.decoder)]

    def read(index: int) -> dict[str, Tensor]:
        tensors = read_tensors(modules[index], architecture.block_prefix(index), source, dtype)
        if device.type != "cuda":
            return tensors
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}

    def room(shape_NTD: tuple[int, ...]) -> HiddenStates:
        return open_hidden(shape_NTD, dtype)

    with torch.inference_mode(), read_ahead(read, range(first_block, len(modules))) as ahead:
        with _with_weights(skeleton, needed, not_needed, source, runtime):
            decoder, resumed = skeleton.get_submodule(architecture.decoder), first_block > 0
            start = DecoderStart(decoder, blocks, device)
            if windows.has_images:
                of_images = ImageStart(skeleton, blocks, start.form, device, dtype)
                hidden, calls = of_images.embed(windows, room, resumed=resumed)
            else:
                hidden, calls = start.embed(tokens_NT, batches, room, resumed=resumed)
            for count in set(more_batch_sizes):
                if count not in calls:
                    calls.add(range(count), start.record(tokens_NT[:count]).calls)
        for index in range(first_block, len(modules)):
            module = modules[index]
            with times.part("weights"):
                fill(module, ahead.take(), device)
                _check_finite(module, source, index)
            yield StreamedBlock(
                index=index,
                module=module,
                units=architecture.units_of(index),
                hidden=hidden,
                device=device,
                _batches=batches,
                _calls=calls,
                _on_batch=on_batch,
                _times=times,
            )
            unload(module)


@contextmanager
def _with_weights(
    skeleton: nn.Module,
    path: str,
    not_needed: Sequence[str],
    source: WeightSource,
    runtime: Runtime,
) -> Iterator[None]:
    """Read everything of a part of the model that comes before its blocks.

    Args:
        skeleton: the model.
        path: from it to the part: the decoder, or with images the model itself.
        not_needed: paths from it to what is left out: the list of blocks, the head.
        source: where the tensors come from.
        runtime: where and in what to compute.
    """
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
    left_out = [(path.rpartition("."), model.get_submodule(path)) for path in paths]
    for (parent, _, leaf), _module in left_out:
        setattr(model.get_submodule(parent), leaf, nn.ModuleList())
    try:
        yield
    finally:
        for (parent, _, leaf), module in left_out:
            setattr(model.get_submodule(parent), leaf, module)


def _check_finite(module: nn.Module, source: WeightSource, block: int) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CalibrationError(
                f"{source.label}: block {block} has NaN or infinite values in "
                f"{source.architecture.block_prefix(block)}{name}; the checkpoint is damaged"
            )

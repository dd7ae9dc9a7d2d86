"""The engine: windows flow through a model one block at a time.

All windows pass block 0, then block 1, and so on. Only the embeddings (at the start), one
block, the next one (which a thread reads meanwhile) and the hidden states are in memory, so the
model may be far larger than memory.

Shapes: N windows, B windows in a batch, T tokens, D hidden, F FFN channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from cfsp.checkpoint.skeleton import (
    blocks_of,
    build_skeleton,
    fill,
    read_tensors,
    unload,
)
from cfsp.engine.activations import observed_activations
from cfsp.engine.call_recorder import BlockCall, Recording, record_calls
from cfsp.engine.hidden_states import HiddenInMemory, HiddenStates
from cfsp.engine.pass_times import PassTimes
from cfsp.engine.read_ahead import read_ahead
from cfsp.errors import CalibrationError

if TYPE_CHECKING:
    from cfsp.checkpoint.architecture import FFNUnit
    from cfsp.checkpoint.families import Family
    from cfsp.checkpoint.reading import WeightSource

# Batches of about this many tokens: large enough for full speed, small enough for a cache.
TOKENS_IN_BATCH = 4096

OnActivations = Callable[[int, int, Tensor, Tensor], None]
OnHidden = Callable[[Tensor, Tensor], None]
OpenHidden = Callable[[tuple[int, ...], torch.dtype], HiddenStates]


@dataclass
class StreamedBlock:
    """One decoder block with its weights, and the windows that are about to pass it.

    Attributes:
        index: position in the model.
        module: the decoder block.
        units: its FFN units; a block may have none.
        hidden: what enters the block, and after `advance` what leaves it.
        device: where the block computes.
    """

    index: int
    module: nn.Module
    units: tuple[FFNUnit, ...]
    hidden: HiddenStates
    device: torch.device
    _family: Family
    _batches: list[slice]
    _calls: dict[int, list[BlockCall]]
    _on_batch: Callable[[int], None]
    _times: PassTimes

    def advance(
        self,
        on_activations: OnActivations | None = None,
        on_hidden: OnHidden = lambda input_BTD, output_BTD: None,
    ) -> None:
        """Let all windows pass the block; the hidden states become its outputs.

        The block's weights are dropped then: what comes after may need the memory.

        Args:
            on_activations: is given the position of an FFN unit among those of the block, the
                index of an FFN in the unit, rows of the input of its down projection (act_RF, see
                `observed_activations`), and which window each row is of; None where nobody looks.
            on_hidden: is given the block's input and output hidden states, both BTD.
        """
        first_window, seqlen = 0, 1

        def on_rows(ffn: int, act_RF: Tensor, token_R: Tensor) -> None:
            assert on_activations is not None
            on_activations(0, ffn, act_RF, first_window + token_R // seqlen)

        with (
            nullcontext()
            if on_activations is None or not self.units
            else observed_activations(self.module, self._family, on_rows)
        ):
            for batch in self._batches:
                with self._times.part("hidden_states"):
                    input_BTD = self.hidden.read(batch).to(self.device)
                call = self.call(self.index, input_BTD.shape[0])
                first_window, seqlen = batch.start, input_BTD.shape[1]
                output_BTD = call(self.module, input_BTD)
                on_hidden(input_BTD, output_BTD)
                with self._times.part("hidden_states"):
                    self.hidden.write(batch, output_BTD)
                self._on_batch(input_BTD.shape[0] * input_BTD.shape[1])
        self.hidden.turn()
        unload(self.module)

    def call(self, index: int, windows: int) -> BlockCall:
        """Return how the model calls one of its blocks with a batch of so many windows."""
        return self._calls[windows][index]

    def pass_through(self, compute: Callable[[Tensor], Tensor], batches: Iterable[slice]) -> None:
        """Let some windows pass a function in this block's place; `hidden.turn` ends the block."""
        for batch in batches:
            with self._times.part("hidden_states"):
                input_BTD = self.hidden.read(batch).to(self.device)
            output_BTD = compute(input_BTD)
            with self._times.part("hidden_states"):
                self.hidden.write(batch, output_BTD)

    def tokens_done(self, tokens: int) -> None:
        """Report progress where `advance` does not."""
        self._on_batch(tokens)


def windows_in_batch(tokens_NT: Tensor, batch_windows: int | None) -> int:
    """Return how many windows pass a block together; None asks for about 4096 tokens."""
    return batch_windows or max(1, TOKENS_IN_BATCH // tokens_NT.shape[1])


def stream_blocks(
    source: WeightSource,
    tokens_NT: Tensor,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_windows: int | None = None,
    on_batch: Callable[[int], None] = lambda tokens: None,
    open_hidden: OpenHidden = HiddenInMemory,
    first_block: int = 0,
    more_batch_sizes: Iterable[int] = (),
    times: PassTimes | None = None,
) -> Iterator[StreamedBlock]:
    """Yield every block in turn; the caller must `advance` each before it asks for the next.

    Args:
        source: the model.
        tokens_NT: windows without padding.
        device: where blocks compute.
        dtype: what they compute in.
        batch_windows: windows that pass together; None for about 4096 tokens.
        on_batch: is told how many tokens have passed a block, after each batch.
        open_hidden: makes room for the hidden states, from their shape NTD and dtype.
        first_block: the block to begin with; if it is not 0, `open_hidden` gives the states
            that enter it.
        more_batch_sizes: numbers of windows that blocks are called with besides those of batches.
        times: is told what the time went into.

    Raises:
        CalibrationError: a weight is NaN or infinite.
        CheckpointError: a tensor is missing.
    """
    times = times or PassTimes()
    size = windows_in_batch(tokens_NT, batch_windows)
    batches = [slice(i, min(i + size, len(tokens_NT))) for i in range(0, len(tokens_NT), size)]
    skeleton = build_skeleton(source.config, dtype)
    blocks = blocks_of(skeleton, source.family)

    def read(index: int) -> dict[str, Tensor]:
        return read_tensors(blocks[index], source.family.block_prefix(index), source, dtype)

    with torch.inference_mode(), read_ahead(read, range(first_block, len(blocks))) as ahead:
        with _Embedding(skeleton, blocks, source, device, dtype) as embedding:
            hidden, calls = embedding.embed(
                tokens_NT, batches, open_hidden, resumed=first_block > 0
            )
            for windows in set(more_batch_sizes) - calls.keys():
                calls[windows] = embedding.calls_for(tokens_NT[:windows])
        for index in range(first_block, len(blocks)):
            module = blocks[index]
            with times.part("weights"):
                fill(module, ahead.take(), device)
                _check_finite(module, source, index)
            yield StreamedBlock(
                index=index,
                module=module,
                units=tuple(unit for unit in source.units if unit.block == index),
                hidden=hidden,
                device=device,
                _family=source.family,
                _batches=batches,
                _calls=calls,
                _on_batch=on_batch,
                _times=times,
            )
            unload(module)


@dataclass
class _Embedding:
    """The part of a model before its first block."""

    skeleton: nn.Module
    blocks: nn.ModuleList
    source: WeightSource
    device: torch.device
    dtype: torch.dtype

    def embed(
        self,
        tokens_NT: Tensor,
        batches: list[slice],
        open_hidden: OpenHidden,
        *,
        resumed: bool,
    ) -> tuple[HiddenStates, dict[int, list[BlockCall]]]:
        """Return the hidden states, and the block calls for each number of windows in a batch.

        Windows are never padded, so the calls depend on a batch's shape only. A resumed pass
        has its hidden states already and needs one batch of every shape.
        """
        hidden: HiddenStates | None = None
        calls: dict[int, list[BlockCall]] = {}
        for batch in batches:
            if resumed and batch.stop - batch.start in calls:
                continue
            recording = self._record(tokens_NT[batch])
            embedded_BTD = recording.embedded_BTD
            assert embedded_BTD is not None
            if hidden is None:
                hidden = open_hidden((*tokens_NT.shape, embedded_BTD.shape[-1]), self.dtype)
            if not resumed:
                hidden.write(batch, embedded_BTD)
            calls.setdefault(len(embedded_BTD), recording.calls)
        assert hidden is not None
        return hidden, calls

    def calls_for(self, tokens_BT: Tensor) -> list[BlockCall]:
        """Return the block calls for a batch of this shape."""
        return self._record(tokens_BT).calls

    def _record(self, tokens_BT: Tensor) -> Recording:
        return record_calls(self._base_model, self.blocks, tokens_BT.to(self.device))

    @property
    def _base_model(self) -> nn.Module:
        model: nn.Module = getattr(self.skeleton, self.source.family.base_prefix)
        return model

    def __enter__(self) -> Self:
        """Read everything of the base model but its blocks: they are the only large part."""
        family, base_model = self.source.family, self._base_model
        with _without_blocks(base_model, family.blocks_in_base_model):
            prefix = f"{family.base_prefix}."
            fill(base_model, read_tensors(base_model, prefix, self.source, self.dtype), self.device)
        return self

    def __exit__(self, *error: object) -> None:
        with _without_blocks(self._base_model, self.source.family.blocks_in_base_model):
            unload(self._base_model)


@contextmanager
def _without_blocks(base_model: nn.Module, path: str) -> Iterator[None]:
    parent_path, _, leaf = path.rpartition(".")
    parent = attrgetter(parent_path)(base_model) if parent_path else base_model
    blocks = getattr(parent, leaf)
    setattr(parent, leaf, nn.ModuleList())
    try:
        yield
    finally:
        setattr(parent, leaf, blocks)


def _check_finite(module: nn.Module, source: WeightSource, block: int) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CalibrationError(
                f"{source.label}: block {block} has NaN or infinite values in "
                f"{source.family.block_prefix(block)}{name}; the checkpoint is damaged"
            )

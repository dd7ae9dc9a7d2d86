"""Windows flow through a model one block at a time.

All windows pass block 0, then block 1, and so on. Only the embeddings (at the start), one
block, the next one (which a thread reads meanwhile) and the hidden states are in memory, so the
model may be far larger than memory.

Shapes: B windows in a batch, T tokens, D hidden, F FFN channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cfsp.architecture.activations import OnRows, observed_activations, observed_sublayers
from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import WeightSource, read_tensors
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, fill, unload
from cfsp.errors import CalibrationError, UsageError
from cfsp.processes import Team
from cfsp.streaming.block_calls import BlockCalls, weights_of_start
from cfsp.streaming.hidden_states import HiddenStates, Room
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.work_dir import PassTimes
from cfsp.text.windows import Windows

# Batches of about this many tokens: large enough for full speed, small enough for a cache.
TOKENS_IN_BATCH = 4096

OnActivations = Callable[[int, int, Tensor, Tensor], None]
OnHidden = Callable[[Tensor, Tensor], None]
OnSublayer = Callable[[int, Tensor, Tensor], None]


@dataclass
class StreamedBlock:
    """One decoder block with its weights, and the windows that are about to pass it."""

    index: int
    module: nn.Module
    units: tuple[Unit, ...]
    hidden: HiddenStates  # what enters the block, and after `advance` what leaves it
    device: torch.device
    dtype: torch.dtype
    calls: BlockCalls
    _batches: list[slice]
    _times: PassTimes
    # Is told how many tokens have passed; whoever shows progress sets it.
    tokens_done: Callable[[int], object] = lambda tokens: None

    def advance(
        self,
        on_activations: OnActivations | None = None,
        on_hidden: OnHidden = lambda input_BTD, output_BTD: None,
        on_sublayer: OnSublayer | None = None,
        on_output: OnRows | None = None,
    ) -> None:
        """Let all windows pass the block, and drop its weights; its outputs are in `hidden` then.

        Shown are what `observed_activations` shows, with the window of each row instead of its
        token; the hidden states before and after the block, both BTD; the position of an attention
        among its units, with the hidden states before the block and after that; and what experts
        add, but only beside activations.
        """
        after: dict[int, Tensor] = {}
        first_window, seqlen = 0, 1
        if not any(unit.removable_experts for unit in self.units):
            on_output = None  # to look costs a product for each expert

        def on_rows(unit: int, ffn: int, act_RF: Tensor, token_R: Tensor) -> None:
            assert on_activations is not None
            on_activations(unit, ffn, act_RF, first_window + token_R // seqlen)

        def compute(batch: slice, input_BTD: Tensor) -> Tensor:
            nonlocal first_window, seqlen
            first_window, seqlen = batch.start, input_BTD.shape[1]
            output_BTD = self.compute(batch, input_BTD)
            on_hidden(input_BTD, output_BTD)
            while after:
                position, after_BTD = after.popitem()
                assert on_sublayer is not None
                on_sublayer(position, input_BTD, after_BTD)
            self.tokens_done(len(input_BTD) * seqlen)
            return output_BTD

        with ExitStack() as stack:
            if on_activations is not None and self.units:
                observed = observed_activations(self.module, self.units, on_rows, on_output)
                stack.enter_context(observed)
            if on_sublayer is not None:
                stack.enter_context(observed_sublayers(self.module, self.units, after))
            self.pass_through(compute, self._batches)
        unload(self.module)

    def compute(self, batch: slice, input_BTD: Tensor) -> Tensor:
        """Return what the block makes of some windows, called as the model calls it."""
        windows = range(batch.start, batch.stop)
        return self.calls.compute(self.index, self.module, windows, input_BTD)

    def pass_through(
        self, compute: Callable[[slice, Tensor], Tensor], batches: Iterable[slice]
    ) -> None:
        """Let some windows pass a function of batch and BTD in this block's place."""
        on_gpu = self.device.type == "cuda"
        for batch in batches:
            with self._times.stage("hidden_states"):
                # A GPU may copy them when it gets there: writing waits for what it computes.
                input_BTD = self.hidden.read(batch).to(self.device, non_blocking=on_gpu)
            output_BTD = compute(batch, input_BTD)
            if on_gpu:  # the time that it still computes is not that of writing
                torch.cuda.synchronize(self.device)
            with self._times.stage("hidden_states"):
                self.hidden.write(batch, output_BTD)


def windows_in_batch(windows: Windows, batch_windows: int | None) -> int:
    """Return how many windows pass a block together; by default about 4096 tokens."""
    return batch_windows or max(1, TOKENS_IN_BATCH // windows.tokens_NT.shape[1])


def part_of(windows: Windows, team: Team, batch_windows: int | None) -> slice:
    """Return which windows one process has: whole batches, which compute as one's, or none."""
    return team.share(len(windows.tokens_NT), windows_in_batch(windows, batch_windows))


def check_enough(windows: Windows, team: Team, batch_windows: int | None) -> None:
    """Check that every process has windows."""
    size, count = windows_in_batch(windows, batch_windows), len(windows.tokens_NT)
    batches = math.ceil(count / size)
    if batches < team.size:
        raise UsageError(
            f"{count} windows in batches of {size} are {batches} batches, too few for "
            f"{team.size} processes; take more --samples, fewer processes, or "
            f"--batch-windows {max(1, count // team.size)}"
        )


def stream_blocks(
    source: WeightSource,
    windows: Windows,
    runtime: Runtime,
    *,
    room: Room | None = None,
    first_block: int = 0,
    more_batch_sizes: Iterable[int] = (),
    times: PassTimes | None = None,
) -> Iterator[StreamedBlock]:
    """Yield every block in turn; the caller must `advance` each before it asks for the next.

    The room for hidden states has those that enter the first block where that is not 0. Blocks may
    be called with more numbers of windows than those of batches.
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

    def read(index: int) -> dict[str, Tensor]:
        tensors = read_tensors(modules[index], architecture.block_prefix(index), source, dtype)
        if device.type != "cuda":
            return tensors
        return {name: tensor.pin_memory() for name, tensor in tensors.items()}

    with torch.inference_mode(), ThreadPoolExecutor(1, "read-ahead") as pool:
        # One block is read ahead and never two. It is gone from here when it is taken.
        ahead = [pool.submit(read, first_block)]
        decoder = skeleton.get_submodule(architecture.decoder)
        with weights_of_start(decoder, blocks, source, runtime):
            calls = BlockCalls(decoder, blocks, tokens_NT, device)
            room = room or partial(HiddenStates, dtype=dtype)
            hidden = calls.embed(batches, room, resumed=first_block > 0)
            calls.learn_sizes(more_batch_sizes)
        for index in range(first_block, len(modules)):
            module, units = modules[index], architecture.units_of(index)
            with times.stage("weights"):
                tensors = ahead.pop().result()
                if index + 1 < len(modules):
                    ahead.append(pool.submit(read, index + 1))
                fill(module, tensors, device)
                del tensors
                _check_finite(module, source, index)
            yield StreamedBlock(index, module, units, hidden, device, dtype, calls, batches, times)
            unload(module)


def _check_finite(module: nn.Module, source: WeightSource, block: int) -> None:
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CalibrationError(
                f"{source.label}: block {block} has NaN or infinite values in "
                f"{source.architecture.block_prefix(block)}{name}; the checkpoint is damaged"
            )

"""Two streams of the same windows around a group of pruned blocks: what enters it, what it should
give.

One stream passes the dense model, the other the pruned one. Windows have one number, that in the
whole text, whichever process has them.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from cfsp.checkpoint.reading import read_tensors
from cfsp.checkpoint.skeleton import fill, unload
from cfsp.errors import CalibrationError
from cfsp.processes import Team
from cfsp.streaming.block_calls import BlockCall
from cfsp.streaming.block_stream import StreamedBlock

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime
    from cfsp.text.windows import Windows


class BlockGroup:
    """Some blocks of a model, which compute one after the other, called as the model calls them.

    They have no weights before the first `fill` and after `unload`. Calls are by the number of
    windows in a batch.
    """

    def __init__(
        self,
        source: WeightSource,
        modules: nn.ModuleList,
        indices: range,
        calls: Mapping[int, Sequence[BlockCall]],
        runtime: Runtime,
    ) -> None:
        self._source, self._runtime = source, runtime
        self.indices, self.modules = indices, [modules[index] for index in indices]
        self._recorded_calls = self._calls = calls

    def outputs(self, hidden_BTD: Tensor) -> Iterator[Tensor]:
        """Yield every block's output."""
        for module, call in zip(self.modules, self._calls[len(hidden_BTD)], strict=True):
            hidden_BTD = call(module, hidden_BTD)
            yield hidden_BTD

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Return the last block's output."""
        for output_BTD in self.outputs(hidden_BTD):
            hidden_BTD = output_BTD
        return hidden_BTD

    def fill(self, instead: Mapping[str, Tensor] | None = None) -> None:
        """Compute with the source's tensors, but for some new ones by origin."""
        self._calls = self._recorded_calls
        for index, module in zip(self.indices, self.modules, strict=True):
            prefix = self._source.architecture.block_prefix(index)
            tensors = read_tensors(module, prefix, self._source, self._runtime.dtype, instead)
            fill(module, tensors, self._runtime.device)

    def fill_for_training(self) -> list[dict[str, nn.Parameter]]:
        """Compute in float32 and for autograd; return what is trained in each block, by names.

        It is the parameters of its units, the bias of the down projection too. Only they require
        gradients.
        """
        self._calls = {
            size: [call.for_training() for call in calls]
            for size, calls in self._recorded_calls.items()
        }
        architecture, trained = self._source.architecture, []
        for index, module in zip(self.indices, self.modules, strict=True):
            prefix = architecture.block_prefix(index)
            tensors = read_tensors(module, prefix, self._source, torch.float32)
            # Copies, because the tensors of a model in memory are its own.
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            fill(module, copies, self._runtime.device)
            names = {
                name
                for unit in architecture.units_of(index)
                for name in (*unit.axes, f"{unit.down.removesuffix('weight')}bias")
            }
            of_units = {
                prefix + name: parameter
                for name, parameter in module.named_parameters()
                if name in names
            }
            for parameter in of_units.values():
                parameter.requires_grad_(True)
            trained.append(of_units)
        return trained

    def unload(self) -> None:
        """Drop the weights."""
        for module in self.modules:
            unload(module)


# So few batches there are at least, so that they differ.
_LEAST_BATCHES = 8
# The root of zero has no gradient, and a block that loses no channel may have no error.
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True)
class TwoStreams:
    """Which windows of a pass over two streams are what.

    A process has some of them, and each of these in two rows of its hidden states: first all of the
    dense stream, then all of the pruned.
    """

    count: int  # of windows
    seqlen: int
    # Windows that nothing is fitted to.
    held_out: tuple[int, ...]
    # Windows that pass together, at most.
    batch: int
    team: Team

    @staticmethod
    def of(windows: Windows, tokens_in_batch: int, team: Team) -> TwoStreams:
        """Return the streams of some windows, with about so many tokens in a batch."""
        count, seqlen = windows.tokens_NT.shape
        batch = max(1, min(tokens_in_batch // seqlen, count // _LEAST_BATCHES))
        held_out = windows.held_out_N.nonzero().flatten().tolist()
        return TwoStreams(count, seqlen, tuple(held_out), batch, team)

    @property
    def fitted(self) -> list[int]:
        """Windows that are not held out."""
        held_out = set(self.held_out)
        return [window for window in range(self.count) if window not in held_out]

    @property
    def judged(self) -> list[tuple[int, ...]]:
        """The held-out windows in batches."""
        starts = range(0, len(self.held_out), self.batch)
        return [self.held_out[i : i + self.batch] for i in starts]

    @cached_property
    def own(self) -> range:
        """The windows of this process."""
        return range(self.count)[self.team.share(self.count, self.batch)]

    @property
    def own_held_out(self) -> list[int]:
        """Those of this process that nothing is fitted to."""
        return [window for window in self.held_out if window in self.own]

    @property
    def own_batches(self) -> list[range]:
        """Those of this process in batches; the last may be smaller."""
        return [self.own[i : i + self.batch] for i in range(0, len(self.own), self.batch)]

    @property
    def batch_sizes(self) -> set[int]:
        """All numbers of windows that blocks are ever called with."""
        trained = self.team.share(self.batch)
        sizes = {self.batch, trained.stop - trained.start}
        return (sizes | set(map(len, self.own_batches)) | set(map(len, self.judged))) - {0}

    def dense_rows(self, windows: range) -> slice:
        """Return the rows of hidden states that have consecutive windows of the dense stream."""
        return slice(windows.start - self.own.start, windows.stop - self.own.start)

    def pruned_rows(self, windows: range) -> slice:
        """Return those of the pruned stream."""
        dense, behind = self.dense_rows(windows), len(self.own)
        return slice(behind + dense.start, behind + dense.stop)


class Batch(NamedTuple):
    """Some windows of both streams at a group of blocks."""

    # Of the pruned stream, as they enter the first of the blocks.
    input_BTD: Tensor
    # Of the dense stream, as they leave the last of them.
    dense_BTD: Tensor
    # Number of the batch among those of its kind, from 0.
    turn: int = 0

    def on(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(self.input_BTD.to(device), self.dense_BTD.to(device), self.turn)

    @staticmethod
    def joined(parts: Sequence[Batch], turn: int) -> Batch:
        """Return the windows of several batches as one."""
        input_BTD = torch.cat([part.input_BTD for part in parts])
        dense_BTD = torch.cat([part.dense_BTD for part in parts])
        return Batch(input_BTD, dense_BTD, turn)


# Of the hidden states that the blocks give for a batch, BTD.
Loss = Callable[[Tensor, Batch], Tensor]


def token_error(output_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return |output - dense| / |dense| of each token, averaged, in float32.

    Relative to each token: the first tokens of a window have a thousand times the energy of the
    others, or more, and would be all that counts.
    """
    dense = dense_BTD.float()
    difference = output_BTD.float() - dense
    energy = dense.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference.square().sum(-1) / energy + _LEAST_SQUARE).sqrt().mean()


def hidden_loss(output_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return the error of each token, averaged, and that of all together, added.

    The second guards the few tokens of huge energy, which attention of other tokens rests on: if
    they lose it, or others gain it, all later blocks break, and one in a thousand hardly shows in
    the first.
    """
    difference = output_BTD.float() - dense_BTD.float()
    energy = dense_BTD.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    whole = (difference.square().sum() / energy + _LEAST_SQUARE).sqrt()
    return token_error(output_BTD, dense_BTD) + whole


@dataclass(frozen=True)
class Judgement:
    """How far blocks are from the dense model, on held-out windows."""

    # Of the last block's output hidden states, relative to the dense stream (see `token_error`).
    error: float
    # What is to become less, such as `hidden_loss`.
    loss: float

    @property
    def is_finite(self) -> bool:
        """Whether neither is NaN or infinite."""
        return math.isfinite(self.error) and math.isfinite(self.loss)

    def check_finite(self, block: int) -> None:
        """Raise CalibrationError if a block computes NaN as it is."""
        if not self.is_finite:
            raise CalibrationError(
                f"block {block} produced NaN or infinite activations; "
                "prune with --set dtype=float32 or bfloat16"
            )


class GroupVisit:
    """A group of pruned blocks with their weights, and both streams around it.

    The dense stream has passed `block` last; `dense_after` has its held-out windows of this process
    after each dense block that the group stands for.
    """

    def __init__(
        self,
        blocks: BlockGroup,
        block: StreamedBlock,
        streams: TwoStreams,
        dense_after: list[Tensor],
    ) -> None:
        self.blocks, self.streams, self.team = blocks, streams, streams.team
        self.device, self.dense_last = block.device, block.index
        # Index of the last of the blocks in the pruned model.
        self.last = blocks.indices[-1]
        self._block, self._dense_after = block, dense_after
        self._reported = 0
        self._gathered: list[Batch] = []

    def batch(self, windows: Sequence[int], turn: int = 0) -> Batch:
        """Return some windows of this process, of both streams."""
        hidden, streams = self._block.hidden, self.streams
        parts = [range(window, window + 1) for window in windows]
        return Batch(
            torch.cat([hidden.read(streams.pruned_rows(part)) for part in parts]),
            torch.cat([hidden.read_written(streams.dense_rows(part)) for part in parts]),
            turn,
        ).on(self.device)

    def batch_of_all(self, windows: Sequence[int], turn: int) -> Batch:
        """Return some windows of all processes, which call this together."""
        if self.team.size == 1:
            return self.batch(windows, turn)
        rows = [row for row, window in enumerate(windows) if window in self.streams.own]
        shape = (2, len(windows), *self._block.hidden.shape_NTD[1:])
        # Nothing is added to what a process has, so that float32 keeps every bit of it.
        states_2BTD = torch.zeros(shape, device=self.device)
        if rows:
            of_own = self.batch([windows[row] for row in rows])
            states_2BTD[0, rows] = of_own.input_BTD.float()
            states_2BTD[1, rows] = of_own.dense_BTD.float()
        input_BTD, dense_BTD = self.team.add_up(states_2BTD)
        return Batch(input_BTD, dense_BTD, turn)

    def own_batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield every window of this process once, with which of each batch are held out, [B]."""
        held_out = set(self.streams.held_out)
        for windows in self.streams.own_batches:
            yield self.batch(windows), torch.tensor([window in held_out for window in windows])

    def gather_held_out(self) -> None:
        """Bring the held-out windows of all processes to the first, which alone can then judge."""
        if self.team.size == 1:
            return
        cpu = torch.device("cpu")
        own = [self.batch([window]).on(cpu) for window in self.streams.own_held_out]
        gathered = self.team.gather_at(0, (own, self._dense_after))
        for of_process, _ in gathered:
            self._gathered.extend(of_process)
        # A process without held-out windows has nothing of any block.
        after = [of_blocks for _, of_blocks in gathered if of_blocks]
        self._dense_after[:] = [torch.cat(of_block) for of_block in zip(*after, strict=True)]

    def _judged(self) -> Iterator[tuple[Batch, slice]]:
        """Yield the held-out windows of all in batches, and their places among these windows."""
        done = 0
        for turn, windows in enumerate(self.streams.judged):
            rows = slice(done, done + len(windows))
            if self.team.size == 1:
                yield self.batch(windows, turn), rows
            else:
                yield Batch.joined(self._gathered[rows], turn).on(self.device), rows
            done = rows.stop

    def judge(self, loss_of: Loss) -> Judgement:
        """Return how far the group is from the dense stream on the held-out windows of all."""
        error = loss = 0.0
        for batch, _ in self._judged():
            output_BTD = self.blocks(batch.input_BTD)
            share = len(output_BTD) / len(self.streams.held_out)
            error += share * float(token_error(output_BTD, batch.dense_BTD))
            loss += share * float(loss_of(output_BTD, batch))
        return Judgement(error, loss)

    def errors(self) -> list[float]:
        """Return the error of every block of the group on the held-out windows of all."""
        error_L = [0.0] * len(self._dense_after)
        for batch, rows in self._judged():
            outputs = self.blocks.outputs(batch.input_BTD)
            share = len(batch.input_BTD) / len(self.streams.held_out)
            for position, (output_BTD, dense_BTD) in enumerate(
                zip(outputs, self._dense_after, strict=True)
            ):
                dense = dense_BTD[rows].to(self.device)
                error_L[position] += share * float(token_error(output_BTD, dense))
        return error_L

    def accept(
        self, before: Judgement, tensors: Mapping[str, Tensor], loss_of: Loss
    ) -> Judgement | None:
        """Leave the group with new tensors, by origin, if held-out windows lose less.

        Return how far it is with them; None if the group stays as it was.
        """
        self.blocks.fill(tensors)
        after = self.judge(loss_of)
        if after.is_finite and after.loss < before.loss:
            return after
        self.blocks.fill()
        return None

    def progress(self, done: float) -> None:
        """Report which part of the work on the group is done, from 0 to 1."""
        tokens_of_window = self.streams.seqlen * len(self.blocks.modules)
        tokens = round(done * len(self.streams.own) * tokens_of_window)
        self._block.tokens_done(tokens - self._reported)
        self._reported = tokens

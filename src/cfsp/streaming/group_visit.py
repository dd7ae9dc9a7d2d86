"""A group of pruned blocks between two streams: what enters them, what they should give.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.processes import Team
from cfsp.streaming.block_group import BlockGroup
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.judge import Judgement, token_error

if TYPE_CHECKING:
    from cfsp.streaming.two_streams import TwoStreams


@dataclass(frozen=True)
class Batch:
    """Some windows of both streams at a group of blocks.

    Attributes:
        input_BTD: hidden states of the pruned stream that enter the first of the blocks.
        dense_BTD: those of the dense stream that leave the last of them.
        tokens_BT: the text.
        turn: number of the batch among those of its kind, from 0.
    """

    input_BTD: Tensor
    dense_BTD: Tensor
    tokens_BT: Tensor
    turn: int

    def on(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return Batch(
            self.input_BTD.to(device),
            self.dense_BTD.to(device),
            self.tokens_BT.to(device),
            self.turn,
        )


def _one_batch(parts: Sequence[Batch], turn: int) -> Batch:
    return Batch(
        torch.cat([part.input_BTD for part in parts]),
        torch.cat([part.dense_BTD for part in parts]),
        torch.cat([part.tokens_BT for part in parts]),
        turn,
    )


# Of the hidden states that the blocks give for a batch, BTD.
Loss = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class GroupVisit:
    """A group of pruned blocks, and both streams around it.

    Attributes:
        blocks: with their weights.
        streams: which windows are what.
    """

    blocks: BlockGroup
    _block: StreamedBlock
    streams: TwoStreams
    _dense_after: list[Tensor]
    _reported: list[int] = field(default_factory=lambda: [0])
    _gathered: list[Batch] = field(default_factory=list)

    @property
    def last(self) -> int:
        """Index of the last of the blocks in the pruned model."""
        return self.blocks.indices[-1]

    @property
    def dense_last(self) -> int:
        """Index of the dense block that the dense stream has passed last."""
        return self._block.index

    @property
    def team(self) -> Team:
        """The processes that have other windows."""
        return self.streams.team

    @property
    def device(self) -> torch.device:
        """Where the blocks compute."""
        return self._block.device

    def batch(self, windows: Sequence[int], turn: int = 0) -> Batch:
        """Return some windows of this process, of both streams."""
        hidden, streams = self._block.hidden, self.streams
        parts = [range(window, window + 1) for window in windows]
        return Batch(
            torch.cat([hidden.read(streams.pruned_rows(part)) for part in parts]),
            torch.cat([hidden.read_written(streams.dense_rows(part)) for part in parts]),
            streams.tokens_NT[list(windows)],
            turn,
        ).on(self.device)

    def batch_of_all(self, windows: Sequence[int], turn: int) -> Batch:
        """Return some windows of all processes, which call this together.

        Args:
            windows: their numbers.
            turn: see `Batch`.
        """
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
        tokens_BT = self.streams.tokens_NT[list(windows)].to(self.device)
        return Batch(input_BTD, dense_BTD, tokens_BT, turn)

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
                yield _one_batch(self._gathered[rows], turn).on(self.device), rows
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
        """Leave the group with new tensors if it is better for them on the held-out windows.

        Args:
            before: how far it is without them.
            tensors: by their stored names.
            loss_of: decides.

        Returns:
            How far it is with them; None if the group stays as it was.
        """
        self.blocks.fill(tensors)
        after = self.judge(loss_of)
        if after.is_finite and after.loss < before.loss:
            return after
        self.blocks.fill()
        return None

    def progress(self, done: float) -> None:
        """Report which part of the work on the group is done, from 0 to 1."""
        tokens_of_window = self.streams.tokens_NT.shape[1] * len(self.blocks.modules)
        tokens = round(done * len(self.streams.own) * tokens_of_window)
        self._block.tokens_done(tokens - self._reported[0])
        self._reported[0] = tokens

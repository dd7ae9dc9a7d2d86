"""One pass that carries two streams of the same windows: through a dense model, and a pruned one.

The dense stream passes a block. Where a group of blocks ends, something may be done to the pruned
blocks, which see both streams; then the pruned stream passes them. Blocks that were removed whole
belong to the one before them, or else to the first that stays: what that should give is what the
dense stream holds after them. The pass has every window
twice: of its 2 N windows the first N are the dense stream, the others the pruned.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, unload
from cfsp.engine.block_group import BlockGroup
from cfsp.engine.block_pass import ResultFiles, pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.engine.judge import Judgement, token_error
from cfsp.processes import Team
from cfsp.text.windows import joined

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.text.windows import Windows

T = TypeVar("T")

# So few batches there are at least, so that they differ.
_LEAST_BATCHES = 8


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
class TwoStreams:
    """Which windows of a pass over two streams are what.

    Attributes:
        windows: N.
        seqlen: T.
        batch: windows that pass together, at most.
        held_out: windows that nothing is fitted to.
    """

    windows: int
    seqlen: int
    batch: int
    held_out: tuple[int, ...]

    @staticmethod
    def of(windows: Windows, tokens_in_batch: int) -> TwoStreams:
        """Return the streams of some windows, with about so many tokens in a batch."""
        count, seqlen = windows.tokens_NT.shape
        batch = max(1, min(tokens_in_batch // seqlen, count // _LEAST_BATCHES))
        held_out = windows.held_out_N.nonzero().flatten().tolist()
        return TwoStreams(count, seqlen, batch, tuple(held_out))

    @property
    def fitted(self) -> list[int]:
        """Windows that are not held out."""
        held_out = set(self.held_out)
        return [window for window in range(self.windows) if window not in held_out]

    @property
    def dense(self) -> list[slice]:
        """The batches of the dense stream; the last may be smaller."""
        starts = range(0, self.windows, self.batch)
        return [slice(i, min(i + self.batch, self.windows)) for i in starts]

    def part(self, own: slice) -> TwoStreams:
        """Return those of one process, which has some of the windows; batches are as large."""
        range_of_own = range(*own.indices(self.windows))
        held_out = (window - own.start for window in self.held_out if window in range_of_own)
        return TwoStreams(len(range_of_own), self.seqlen, self.batch, tuple(held_out))

    def pruned(self, dense: slice) -> slice:
        """Return where the pruned stream has the windows of a part of the dense stream."""
        return slice(self.windows + dense.start, self.windows + dense.stop)

    @property
    def judged(self) -> list[tuple[int, ...]]:
        """The held-out windows in batches."""
        starts = range(0, len(self.held_out), self.batch)
        return [self.held_out[i : i + self.batch] for i in starts]

    @property
    def batch_sizes(self) -> set[int]:
        """All numbers of windows that blocks are ever called with."""
        sizes = {part.stop - part.start for part in self.dense}
        return sizes | {len(part) for part in self.judged} | {self.batch}


@dataclass(frozen=True)
class GroupAtWork:
    """A group of pruned blocks between the streams: what enters them, what they should give.

    Attributes:
        last: index of the last of the blocks in the pruned model.
        dense_last: index of the dense block that the dense stream has passed last.
        group: the blocks, with their weights.
        streams: which windows of this process are what.
        whole: which windows of all processes are what.
        dtype: what blocks compute in.
        team: the processes that have other windows.
    """

    last: int
    dense_last: int
    group: BlockGroup
    streams: TwoStreams
    whole: TwoStreams
    dtype: torch.dtype
    team: Team
    _first_window: int
    _block: StreamedBlock
    _tokens_NT: Tensor
    _dense_after: list[Tensor]
    _reported: list[int] = field(default_factory=lambda: [0])
    _gathered: list[Batch] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        """Where the blocks compute."""
        return self._block.device

    def batch(self, windows: Sequence[int], turn: int = 0) -> Batch:
        """Return some windows of both streams."""
        hidden, device = self._block.hidden, self.device
        parts = [slice(window, window + 1) for window in windows]
        pruned = [hidden.read(self.streams.pruned(part)) for part in parts]
        return Batch(
            torch.cat(pruned),
            torch.cat([hidden.read_written(part) for part in parts]),
            self._tokens_NT[[self._first_window + window for window in windows]],
            turn,
        ).on(device)

    def batch_of_all(self, windows: Sequence[int], turn: int = 0) -> Batch:
        """Return some windows of all processes, which call this together.

        Args:
            windows: their numbers among those of all.
            turn: see `Batch`.
        """
        if self.team.size == 1:
            return self.batch(windows, turn)
        own = range(self._first_window, self._first_window + self.streams.windows)
        rows = [row for row, window in enumerate(windows) if window in own]
        shape = (2, len(windows), *self._block.hidden.shape_NTD[1:])
        # Nothing is added to what a process has, so that float32 keeps every bit of it.
        states_2BTD = torch.zeros(shape, device=self.device)
        if rows:
            of_own = self.batch([windows[row] - own.start for row in rows])
            states_2BTD[0, rows] = of_own.input_BTD.float()
            states_2BTD[1, rows] = of_own.dense_BTD.float()
        input_BTD, dense_BTD = self.team.add_up(states_2BTD)
        tokens_BT = self._tokens_NT[list(windows)].to(self.device)
        return Batch(input_BTD, dense_BTD, tokens_BT, turn)

    def all_batches(self) -> Iterator[tuple[Batch, Tensor]]:
        """Yield every window of both streams once, with which of each batch are held out, [B]."""
        held_out = set(self.streams.held_out)
        for part in self.streams.dense:
            windows = range(part.start, part.stop)
            yield self.batch(windows), torch.tensor([window in held_out for window in windows])

    def gather_held_out(self) -> None:
        """Bring the held-out windows of all processes to the first, which alone can then judge."""
        if self.team.size == 1:
            return
        own = [self.batch([window]).on(torch.device("cpu")) for window in self.streams.held_out]
        gathered = self.team.gather_at(0, (own, self._dense_after))
        for of_process, _ in gathered:
            self._gathered.extend(of_process)
        # A process without held-out windows has nothing of any block.
        after = [of_blocks for _, of_blocks in gathered if of_blocks]
        self._dense_after[:] = [torch.cat(of_block) for of_block in zip(*after, strict=True)]

    def _judged(self) -> Iterator[tuple[Batch, slice]]:
        """Yield the held-out windows of all in batches, and their places among these windows."""
        done = 0
        for turn, windows in enumerate(self.whole.judged):
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
            output_BTD = self.group(batch.input_BTD)
            share = len(output_BTD) / len(self.whole.held_out)
            error += share * float(token_error(output_BTD, batch.dense_BTD))
            loss += share * float(loss_of(output_BTD, batch))
        return Judgement(error, loss)

    def errors(self) -> list[float]:
        """Return the error of every block of the group on the held-out windows of all."""
        error_L = [0.0] * len(self._dense_after)
        for batch, rows in self._judged():
            outputs = self.group.outputs(batch.input_BTD)
            share = len(batch.input_BTD) / len(self.whole.held_out)
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
        self.group.fill(self.dtype, tensors)
        after = self.judge(loss_of)
        if after.is_finite and after.loss < before.loss:
            return after
        self.group.fill(self.dtype, {})
        return None

    def progress(self, done: float) -> None:
        """Report which part of the work on the group is done, from 0 to 1."""
        tokens = self.streams.windows * self.streams.seqlen * len(self.group.modules)
        tokens = round(done * tokens)
        self._block.tokens_done(tokens - self._reported[0])
        self._reported[0] = tokens


def pass_two_streams(
    source: WeightSource,
    pruned: WeightSource,
    windows: Windows,
    work: Callable[[GroupAtWork], T | None],
    files: ResultFiles[T | None],
    engine: Engine,
    place: Workplace,
    *,
    name: str,
    streams: TwoStreams,
    own: slice = slice(None),
    group_of: Callable[[int], range] = lambda block: range(block, block + 1),
    removed: Collection[int] = (),
) -> list[T | None]:
    """Let both streams pass all blocks; do something to each group of pruned blocks on the way.

    Args:
        source: the dense model.
        pruned: what the cut makes of it, earlier repairs included.
        windows: two or more.
        work: is given each group when the dense stream has passed it, and leaves it with the
            weights that the pruned stream goes through.
        files: puts results on disk.
        engine: where and in what to compute.
        place: where to spill and to save.
        name: of the pass.
        streams: which of the windows are what.
        own: those that this process has, of the team of the workplace.
        group_of: gives the blocks that are one group, from the index of any of them; indices are
            those in the pruned model.
        removed: the dense model's blocks that the pruned one does not have.

    Returns:
        For every block of the dense model what `work` returned, at the last of each group; None
        at the others.

    Raises:
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the workplace holds unfinished work of something else.
    """
    modules = blocks_of(build_skeleton(pruned.config, engine.dtype), pruned.architecture)
    own = slice(*own.indices(streams.windows))
    kept = [block for block in range(source.architecture.block_count) if block not in removed]
    ends = {
        (kept[group[-1] + 1] if group[-1] + 1 < len(kept) else source.architecture.block_count)
        - 1: group
        for group in map(group_of, range(len(kept)))
    }
    visits = _Visits(
        pruned,
        modules,
        windows.tokens_NT,
        streams.part(own),
        streams,
        own.start,
        engine.dtype,
        place.team,
        work,
        kept,
        ends,
    )
    windows = windows.part(own)
    results = pass_blocks(
        source,
        joined([windows, windows]),
        visits.visit,
        files,
        name=name,
        device=engine.device,
        dtype=engine.dtype,
        batch_windows=streams.batch,
        place=place,
        more_batch_sizes=visits.batch_sizes,
        team=place.team,
        may_stop_after=lambda block: block in ends,
    )
    at_last: list[T | None] = [None] * len(results)
    for end, group in ends.items():
        at_last[kept[group[-1]]] = results[end]
    return at_last


@dataclass(frozen=True)
class _Visits(Generic[T]):
    """What stays the same from block to block, and what a group's blocks leave to the last.

    Attributes:
        streams: of this process.
        whole: of all processes.
        first_window: number of the first of this process among those of all.
        kept: indices in the dense model of the pruned model's blocks.
        ends: the dense block after which each group is at work.
        dense_after: the dense stream's held-out windows after each block of the group so far, and
            after the removed ones behind it.
    """

    pruned: WeightSource
    modules: nn.ModuleList
    tokens_NT: Tensor
    streams: TwoStreams
    whole: TwoStreams
    first_window: int
    dtype: torch.dtype
    team: Team
    work: Callable[[GroupAtWork], T | None]
    kept: Sequence[int]
    ends: Mapping[int, range]
    dense_after: list[Tensor] = field(default_factory=list)

    @property
    def batch_sizes(self) -> set[int]:
        """All numbers of windows that blocks are ever called with."""
        own = self.team.share(self.whole.batch)
        trained = {own.stop - own.start} - {0}
        return self.streams.batch_sizes | self.whole.batch_sizes | trained

    def visit(self, block: StreamedBlock) -> T | None:
        """Let the dense stream pass a block, and the pruned one the group that ends with it."""
        streams, hidden = self.streams, block.hidden
        block.pass_through(block.compute, streams.dense)
        unload(block.module)
        held_out = [hidden.read_written(slice(i, i + 1)) for i in streams.held_out]
        if held_out:  # those of another process may be all there are
            if block.index not in self.kept:
                del self.dense_after[-1:]
            if block.index >= self.kept[0]:
                self.dense_after.append(torch.cat(held_out))
        block.tokens_done(streams.windows * streams.seqlen)
        indices = self.ends.get(block.index)
        waiting = map(streams.pruned, streams.dense)
        result = None
        if indices is None:
            block.pass_through(lambda batch, hidden_BTD: hidden_BTD, waiting)
        else:
            group = BlockGroup(
                self.pruned,
                [self.modules[index] for index in indices],
                indices[0],
                {
                    size: [block.call(self.kept[index], size) for index in indices]
                    for size in self.batch_sizes
                },
                block.device,
            )
            group.fill(self.dtype, {})
            at_work = GroupAtWork(
                indices[-1],
                block.index,
                group,
                streams,
                self.whole,
                self.dtype,
                self.team,
                self.first_window,
                block,
                self.tokens_NT,
                self.dense_after,
            )
            result = self.work(at_work)
            block.pass_through(lambda batch, hidden_BTD: group(hidden_BTD), waiting)
            at_work.progress(1.0)
            group.unload()
            self.dense_after.clear()
        hidden.turn()
        return result

"""One pass that carries two streams of the same windows: through a dense model, and a pruned one.

The dense stream passes a block. Where a group of blocks ends, something may be done to the pruned
blocks, which see both streams; then the pruned stream passes them. Blocks that were removed whole
belong to the one before them, or else to the first that stays: what that should give is what the
dense stream holds after them.

Windows have one number, that in the whole text, whichever process has them.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, unload
from cfsp.processes import Team
from cfsp.streaming.block_group import BlockGroup
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.group_visit import GroupVisit
from cfsp.text.windows import joined

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime
    from cfsp.streaming.work_dir import WorkDir
    from cfsp.text.windows import Windows

T = TypeVar("T")

# So few batches there are at least, so that they differ.
_LEAST_BATCHES = 8


@dataclass(frozen=True)
class TwoStreams:
    """Which windows of a pass over two streams are what.

    A process has some of them, and each of these in two rows of its hidden states: first all of the
    dense stream, then all of the pruned.

    Attributes:
        tokens_NT: the text.
        held_out: windows that nothing is fitted to.
        batch: windows that pass together, at most.
        team: the processes that share them.
    """

    tokens_NT: Tensor
    held_out: tuple[int, ...]
    batch: int
    team: Team

    @staticmethod
    def of(windows: Windows, tokens_in_batch: int, team: Team) -> TwoStreams:
        """Return the streams of some windows, with about so many tokens in a batch."""
        count, seqlen = windows.tokens_NT.shape
        batch = max(1, min(tokens_in_batch // seqlen, count // _LEAST_BATCHES))
        held_out = windows.held_out_N.nonzero().flatten().tolist()
        return TwoStreams(windows.tokens_NT, tuple(held_out), batch, team)

    @property
    def fitted(self) -> list[int]:
        """Windows that are not held out."""
        held_out = set(self.held_out)
        return [window for window in range(len(self.tokens_NT)) if window not in held_out]

    @property
    def judged(self) -> list[tuple[int, ...]]:
        """The held-out windows in batches."""
        starts = range(0, len(self.held_out), self.batch)
        return [self.held_out[i : i + self.batch] for i in starts]

    @cached_property
    def own(self) -> range:
        """The windows of this process: whole batches."""
        count = len(self.tokens_NT)
        own = self.team.share(math.ceil(count / self.batch))
        return range(own.start * self.batch, min(own.stop * self.batch, count))

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


class TwoStreamPass(Visitor[T | None]):
    """Lets both streams pass all blocks; does something to each group of pruned blocks on the way.

    Args:
        name: of the pass.
        source: the dense model.
        pruned: what the cut makes of it, earlier repairs included.
        streams: which windows are what.
        runtime: where and in what to compute.
        removed: the dense model's blocks that the pruned one does not have.

    Attributes:
        source: the dense model.
        pruned: the pruned one.
        runtime: where and in what to compute.
        kept: indices in the dense model of the pruned model's blocks.
    """

    waits_for_others = True

    def __init__(
        self,
        name: str,
        source: WeightSource,
        pruned: WeightSource,
        streams: TwoStreams,
        runtime: Runtime,
        removed: Collection[int],
    ) -> None:
        super().__init__(name)
        self.source, self.pruned = source, pruned
        self.runtime = replace(runtime, batch_windows=streams.batch)
        self.more_batch_sizes = streams.batch_sizes
        self._streams = streams
        self._modules = blocks_of(build_skeleton(pruned.config, runtime.dtype), pruned.architecture)
        count = source.architecture.block_count
        self.kept = [block for block in range(count) if block not in removed]
        # The dense stream's held-out windows after each block of the group so far, and after the
        # removed ones behind it.
        self._dense_after: list[Tensor] = []

    def group_of(self, block: int) -> range:
        """Return the blocks that are one group with any of them; indices in the pruned model."""
        return range(block, block + 1)

    @abstractmethod
    def work(self, group: GroupVisit) -> T | None:
        """Do something to a group that the dense stream has passed.

        It is left with the weights that the pruned stream goes through.
        """

    def pass_all(self, windows: Windows, place: WorkDir) -> list[T | None]:
        """Let all windows pass.

        Returns:
            For every block of the dense model what `work` returned, at the last of each group; None
            at the others.

        Raises:
            CalibrationError: a weight or an activation is NaN or infinite.
            ResumeError: the work directory holds unfinished work of something else.
        """
        own = windows.part(slice(self._streams.own.start, self._streams.own.stop))
        results = pass_blocks(self.source, joined([own, own]), self, self.runtime, place)
        at_last: list[T | None] = [None] * len(results)
        for end, group in self._group_at.items():
            at_last[self.kept[group[-1]]] = results[end]
        return at_last

    @cached_property
    def _group_at(self) -> dict[int, range]:
        """The dense block after which each group is worked on."""
        kept = [*self.kept, self.source.architecture.block_count]
        groups = map(self.group_of, range(len(self.kept)))
        return {kept[group[-1] + 1] - 1: group for group in groups}

    def may_stop_after(self, block: int) -> bool:
        """Return whether a group ends there."""
        return block in self._group_at

    def visit(self, block: StreamedBlock) -> T | None:
        """Let the dense stream pass a block, and the pruned one the group that ends with it."""
        streams, hidden = self._streams, block.hidden
        block.pass_through(block.compute, map(streams.dense_rows, streams.own_batches))
        unload(block.module)
        held_out = [
            hidden.read_written(streams.dense_rows(range(window, window + 1)))
            for window in streams.own_held_out
        ]
        if held_out:  # those of another process may be all there are
            if block.index not in self.kept:
                del self._dense_after[-1:]
            if block.index >= self.kept[0]:
                self._dense_after.append(torch.cat(held_out))
        block.tokens_done(len(streams.own) * streams.tokens_NT.shape[1])
        waiting = map(streams.pruned_rows, streams.own_batches)
        indices = self._group_at.get(block.index)
        result = None
        if indices is None:
            block.pass_through(lambda rows, hidden_BTD: hidden_BTD, waiting)
        else:
            calls = {
                size: [block.call(self.kept[index], size) for index in indices]
                for size in self.more_batch_sizes
            }
            blocks = BlockGroup(self.pruned, self._modules, indices, calls, self.runtime)
            blocks.fill()
            group = GroupVisit(blocks, block, streams, self._dense_after)
            result = self.work(group)
            block.pass_through(lambda rows, hidden_BTD: blocks(hidden_BTD), waiting)
            group.progress(1.0)
            blocks.unload()
            self._dense_after.clear()
        hidden.turn()
        return result

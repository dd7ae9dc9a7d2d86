"""One pass that carries two streams of the same windows: through a dense model, and a pruned one.

The dense stream passes a block. Where a group of blocks ends, something may be done to the pruned
blocks, which see both streams; then the pruned stream passes them. Blocks that were removed whole
belong to the one before them, or else to the first that stays: what that should give is what the
dense stream holds after them. The pass has every window
twice: of its 2 N windows the first N are the dense stream, the others the pruned.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, unload
from cfsp.engine.block_group import BlockGroup
from cfsp.engine.block_pass import ResultFiles, pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.engine.group_at_work import GroupAtWork
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
    own: slice,
    group_of: Callable[[int], range] = lambda block: range(block, block + 1),
    removed: Collection[int],
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

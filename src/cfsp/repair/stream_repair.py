"""Repair of the pruned stream, group by group: what is common to fitting and to training.

The dense stream passes a block. Where a group of blocks ends, the pruned blocks are repaired, which
see both streams; then the pruned stream passes them. Blocks that were removed whole belong to the
one before them, or else to the first that stays: what that should give is what the dense stream
holds after them. Of several processes the first decides for all.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, unload
from cfsp.cut.surgery import PrunedSource
from cfsp.repair.result import BlockRepair, PruningResult, add_step, new_tensors, write_tensors
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.two_streams import Batch, BlockGroup, GroupVisit, TwoStreams, hidden_loss
from cfsp.text.windows import joined

if TYPE_CHECKING:
    from cfsp.job import Job
    from cfsp.text.windows import Windows

# What a repair did, and the new tensors if they are kept.
Repaired = tuple[BlockRepair, Mapping[str, Tensor]]


class StreamRepair(Visitor[BlockRepair | None]):
    """A step of repair on the pruned model's own hidden states."""

    waits_for_others = True

    def __init__(
        self, name: str, job: Job, repaired: PruningResult, windows: Windows, tokens_in_batch: int
    ) -> None:
        super().__init__(name)
        self._job, self._repaired, self._windows = job, repaired, windows
        self.pruned = PrunedSource(job.source, repaired.plan, repaired.tensors)
        self._streams = TwoStreams.of(windows, tokens_in_batch, job.work_dir.team)
        self.runtime = replace(job.runtime, batch_windows=self._streams.batch)
        self.more_batch_sizes = self._streams.batch_sizes
        skeleton = build_skeleton(self.pruned.config, job.runtime.dtype)
        self._modules = blocks_of(skeleton, self.pruned.architecture)
        removed, count = repaired.plan.removed_blocks, job.source.architecture.block_count
        # Indices in the dense model of the pruned model's blocks.
        self._kept = [block for block in range(count) if block not in removed]
        # The dense stream's held-out windows after each block of the group so far, and after the
        # removed ones behind it.
        self._dense_after: list[Tensor] = []
        self._directory = job.work_dir.first_directory_of(name)

    def group_of(self, block: int) -> range:
        """Return the blocks that are one group with any of them; indices in the pruned model."""
        return range(block, block + 1)

    @abstractmethod
    def work(self, group: GroupVisit) -> BlockRepair | None:
        """Repair a group that the dense stream has passed; None where nothing can be.

        It is left with the weights that the pruned stream goes through.
        """

    def step(self) -> PruningResult:
        """Return what the step makes of what was there before it; errors are those of a pass."""
        own = self._windows.part(slice(self._streams.own.start, self._streams.own.stop))
        both, work_dir = joined([own, own]), self._job.work_dir
        results = pass_blocks(self._job.source, both, self, self.runtime, work_dir)
        at_last: list[BlockRepair | None] = [None] * len(results)
        for end, group in self._group_at.items():
            at_last[self._kept[group[-1]]] = results[end]
        return add_step(self._repaired, self.name, self._directory, [[each] for each in at_last])

    @cached_property
    def _group_at(self) -> dict[int, range]:
        """The dense block after which each group is worked on."""
        kept = [*self._kept, self._job.source.architecture.block_count]
        groups = map(self.group_of, range(len(self._kept)))
        return {kept[group[-1] + 1] - 1: group for group in groups}

    def may_stop_after(self, block: int) -> bool:
        """Return whether a group ends there."""
        return block in self._group_at

    def visit(self, block: StreamedBlock) -> BlockRepair | None:
        """Let the dense stream pass a block, and the pruned one the group that ends with it."""
        streams, hidden = self._streams, block.hidden
        block.pass_through(block.compute, map(streams.dense_rows, streams.own_batches))
        unload(block.module)
        held_out = [
            hidden.read_written(streams.dense_rows(range(window, window + 1)))
            for window in streams.own_held_out
        ]
        if held_out:  # those of another process may be all there are
            if block.index not in self._kept:
                del self._dense_after[-1:]
            if block.index >= self._kept[0]:
                self._dense_after.append(torch.cat(held_out))
        block.tokens_done(len(streams.own) * streams.seqlen)
        waiting = map(streams.pruned_rows, streams.own_batches)
        indices = self._group_at.get(block.index)
        result = None
        if indices is None:
            block.pass_through(lambda rows, hidden_BTD: hidden_BTD, waiting)
        else:
            calls = {
                size: [block.call(self._kept[index], size) for index in indices]
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
        hidden.swap_buffers()
        return result

    def save(self, result: BlockRepair | None, directory: Path, block: int) -> None:
        """Write the facts of one block; its new tensors are in a file already."""
        facts = None if result is None else result.to_json()
        write_atomically(_facts_path(directory, block), json.dumps(facts).encode())

    def load(self, directory: Path, block: int) -> BlockRepair | None:
        """Read the facts of one block."""
        facts = json.loads(_facts_path(directory, block).read_text(encoding="utf-8"))
        return None if facts is None else BlockRepair.from_json(facts)

    def done_by_first(self, group: GroupVisit, repair: Callable[[], Repaired]) -> BlockRepair:
        """Return what the first process did with a group; all have the same weights then.

        `repair` leaves the group with the better of its weights, and is called in the first process
        alone, whose errors all raise.
        """
        block = self._kept[group.last]

        def repair_and_write() -> BlockRepair:
            done, tensors = repair()
            if done.kept:
                write_tensors(self._directory, block, tensors)
            return done

        done = group.team.from_first(repair_and_write)
        if not group.team.is_first:
            tensors = {}
            if done.kept:
                written = new_tensors(self._directory, block)
                tensors = {name: tensor.read() for name, tensor in written.items()}
            group.blocks.fill(tensors)
        return done


def error_of_hidden(output_BTD: Tensor, batch: Batch) -> Tensor:
    """Return how far hidden states are from the dense stream's (see `hidden_loss`)."""
    return hidden_loss(output_BTD, batch.dense_BTD)


def _facts_path(directory: Path, block: int) -> Path:
    return directory / f"repaired-{block:05d}.json"

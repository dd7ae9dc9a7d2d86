"""Repair of the pruned stream, group by group: what is common to fitting and to training.

A pass over two streams keeps what it did with each group. Of several processes the first decides
for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.checkpoint.output import write_atomically
from cfsp.cut.surgery import PrunedSource
from cfsp.repair.result import BlockRepair, PruningResult, add_step, new_tensors, write_tensors
from cfsp.streaming.group_visit import Batch, GroupVisit
from cfsp.streaming.judge import hidden_loss
from cfsp.streaming.two_streams import TwoStreamPass, TwoStreams

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.job import Job
    from cfsp.text.windows import Windows


class StreamRepair(TwoStreamPass[BlockRepair]):
    """A step of repair on the pruned model's own hidden states.

    Args:
        name: of the step.
        job: what is pruned.
        repaired: what goes and what was repaired before.
        windows: two or more; some are held out (see `cfsp.text.windows`).
        tokens_in_batch: about how many pass together.
        pruned: what the cut makes of it, if it is there.
    """

    pruned: PrunedSource

    def __init__(
        self,
        name: str,
        job: Job,
        repaired: PruningResult,
        windows: Windows,
        tokens_in_batch: int,
        pruned: PrunedSource | None = None,
    ) -> None:
        pruned = pruned or PrunedSource(job.source, repaired.plan, repaired.tensors)
        streams = TwoStreams.of(windows, tokens_in_batch, job.place.team)
        removed = repaired.plan.removed_blocks
        super().__init__(name, job.source, pruned, streams, job.runtime, removed)
        self._place, self._windows, self._repaired = job.place, windows, repaired
        self._directory = job.place.first_directory_of(name)

    def step(self) -> PruningResult:
        """Return what the step makes of what was there before it; errors are those of the pass."""
        done = self.pass_all(self._windows, self._place)
        return add_step(self._repaired, self.name, self._directory, [[each] for each in done])

    def save(self, result: BlockRepair | None, directory: Path, block: int) -> None:
        """Write the facts of one block; its new tensors are in a file already."""
        facts = None if result is None else result.to_json()
        write_atomically(_facts_path(directory, block), json.dumps(facts).encode())

    def load(self, directory: Path, block: int) -> BlockRepair | None:
        """Read the facts of one block."""
        facts = json.loads(_facts_path(directory, block).read_text(encoding="utf-8"))
        return None if facts is None else BlockRepair.from_json(facts)

    def done_by_first(
        self, group: GroupVisit, repair: Callable[[], tuple[BlockRepair, Mapping[str, Tensor]]]
    ) -> BlockRepair:
        """Return what the first process did with a group; all have the same weights then.

        Args:
            group: the blocks.
            repair: leaves the group with the better of its weights, and returns what it did, and
                the new tensors if they are kept; called in the first process alone.

        Raises:
            CfspError: the first process raised it.
        """

        block = self.kept[group.last]

        def repair_and_write() -> BlockRepair:
            done, tensors = repair()
            if done.kept:
                write_tensors(self._directory, block, tensors)
            return done

        done = group.team.from_first(repair_and_write)
        if not group.team.is_first:
            tensors = {}
            if done.kept:
                file = new_tensors(self._directory, block)
                tensors = {name: file.read(name) for name in file.specs}
            group.blocks.fill(tensors)
        return done


def error_of_hidden(output_BTD: Tensor, batch: Batch) -> Tensor:
    """Return how far hidden states are from the dense stream's (see `hidden_loss`)."""
    return hidden_loss(output_BTD, batch.dense_BTD)


def _facts_path(directory: Path, block: int) -> Path:
    return directory / f"repaired-{block:05d}.json"

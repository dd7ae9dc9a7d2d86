"""One pass over all blocks: what calibration and repair have in common.

A visitor does what it likes with each block and gives a result. The pass spills hidden states,
saves as it goes, resumes what was killed, shows progress and takes the time.
"""

from __future__ import annotations

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.reading import WeightSource
from cfsp.processes import Team
from cfsp.progress import item_progress
from cfsp.streaming.block_stream import StreamedBlock, stream_blocks, windows_in_batch
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.runtime import Runtime, runtime_identity
from cfsp.streaming.work_dir import PassState, PassTimes, WorkDir, reading_work
from cfsp.text.windows import Windows

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Saving may take this fraction of the time, so that it never slows a pass by more.
SHARE_OF_TIME = 0.02
# What the first save is expected to cost; later ones are measured.
_BYTES_PER_SECOND = 300e6
_LEAST_SECONDS = 0.01


class Visitor(ABC, Generic[T]):
    """Does something with every block of a pass, and keeps what came of it."""

    # Numbers of windows that blocks are called with besides those of batches.
    more_batch_sizes: Collection[int] = ()
    more_tokens: int = 0  # that visits report beyond those that pass the blocks
    # Whether visits wait for those of other processes, which have other windows: they then save
    # together and go on at the same block.
    waits_for_others: bool = False

    def __init__(self, name: str) -> None:
        # Of the pass: its directory in the work directory, and what people read of it.
        self.name = self.label = name

    @abstractmethod
    def visit(self, block: StreamedBlock) -> T:
        """Advance a block and return its result."""

    def save(self, result: T, directory: Path, block: int) -> None:
        """Write the result of one block, here JSON types; it is on disk when this returns."""
        write_atomically(directory / f"result-{block:05d}.json", json.dumps(result).encode())

    def load(self, directory: Path, block: int) -> T:
        """Read what `save` wrote, the same bit for bit."""
        result: T = json.loads((directory / f"result-{block:05d}.json").read_text("utf-8"))
        return result

    def may_stop_after(self, block: int) -> bool:
        """Return whether hidden states and results are all that the next visit needs."""
        return True


def pass_blocks(
    source: WeightSource, windows: Windows, visitor: Visitor[T], runtime: Runtime, work_dir: WorkDir
) -> list[T]:
    """Let all windows pass all blocks, or those that a killed run left; return all results."""
    label, blocks = visitor.label, source.architecture.block_count
    state = None
    if work_dir.identity is not None:
        identity = _identity(source, windows, runtime)
        state = PassState(work_dir.directory / visitor.name, {**identity, **work_dir.identity})
    team = work_dir.team if visitor.waits_for_others else Team()
    if state is not None and team.size > 1:
        # They save together: on at the last block that every process can go on at.
        state.next_block = max(set.intersection(*team.gather(state.reachable)))
    results: list[T] = []
    if state is not None and state.next_block:
        with reading_work(state.directory, f"{state.directory} is not complete"):
            results = [visitor.load(state.directory, block) for block in range(state.next_block)]
        if label not in work_dir.times:  # what this run made itself is no news
            logger.info("%s: going on at block %d of %d", label, len(results), blocks)
    if len(results) == blocks:
        return results
    times = work_dir.times.setdefault(label, PassTimes())
    saver = None if state is None else _Saver(state, visitor, results, times, team)
    tokens = windows.tokens_NT.numel() * blocks + visitor.more_tokens
    done = tokens * len(results) // blocks
    bar = item_progress(label, tokens, "tok", unit_scale=True, initial=done)
    with times.stage("total"), bar:
        for block in stream_blocks(
            source,
            windows,
            runtime,
            room=partial(_open_hidden, visitor, state, work_dir, runtime),
            first_block=len(results),
            more_batch_sizes=visitor.more_batch_sizes,
            times=times,
        ):
            block.tokens_done = bar.update
            with times.stage("visits"):
                results.append(visitor.visit(block))
            bar.set_postfix_str(f"block {len(results)} of {blocks}", refresh=False)
            more = block.index + 1 < blocks and not block.calls.carry(block.index)
            if saver is not None and more and visitor.may_stop_after(block.index):
                saver.block_done(block.hidden)
        if saver is not None:
            saver.all_done()
    return results


@dataclass
class _Saver:
    """Saves results and hidden states, as often as costs little."""

    state: PassState
    visitor: Visitor[Any]
    results: list[Any]
    times: PassTimes
    team: Team
    cost: float = 0.0  # in seconds, of the last save
    last: float = 0.0  # when that was

    def block_done(self, hidden: HiddenStates) -> None:
        if not self.cost:
            self._costs(hidden.nbytes / _BYTES_PER_SECOND)
        if self.team.from_first(self._is_due):
            start = time.monotonic()
            self._save(hidden)
            self._costs(time.monotonic() - start)

    def _is_due(self) -> bool:
        return (time.monotonic() - self.last) * SHARE_OF_TIME >= self.cost

    def _costs(self, seconds: float) -> None:
        self.cost, self.last = max(_LEAST_SECONDS, seconds), time.monotonic()

    def all_done(self) -> None:
        """Save the results; hidden states are no longer needed."""
        self._save(None)

    def _save(self, hidden: HiddenStates | None) -> None:
        with self.times.stage("saving"):
            for block in range(self.state.next_block, len(self.results)):
                self.visitor.save(self.results[block], self.state.directory, block)
            if hidden is not None:
                hidden.save(self.state.hidden_file(len(self.results)))
            self.state.commit(len(self.results))
            # Who goes on removes what others would go back to.
            self.team.gather(None)
            self.state.remove_earlier()


def _open_hidden(
    visitor: Visitor[Any],
    state: PassState | None,
    work_dir: WorkDir,
    runtime: Runtime,
    shape_NTD: tuple[int, ...],
) -> HiddenStates:
    """Make room for hidden states: in memory, or beyond the budget in a file."""
    dtype, directory = runtime.dtype, None
    nbytes = math.prod(shape_NTD) * dtype.itemsize
    if nbytes > work_dir.memory_budget:
        directory = work_dir.directory_of(visitor.name)
        logger.info(
            f"{visitor.label}: {nbytes / 1e9:.3g} GB of hidden states exceed the memory budget of "
            f"{work_dir.memory_budget / 1e9:.3g} GB; they go to a file in {directory}"
        )
    hidden = HiddenStates(shape_NTD, dtype, directory, pinned=runtime.device.type == "cuda")
    if state is not None and state.next_block:
        path = state.hidden_file(state.next_block)
        with reading_work(state.directory, f"{path} is gone or damaged"):
            hidden.load(path)
    return hidden


def _identity(source: WeightSource, windows: Windows, runtime: Runtime) -> dict[str, Any]:
    """Return what the results of any pass depend on."""
    return {
        "model fingerprint": source.fingerprint,
        "calibration text": windows.digest,
        "batch of windows": windows_in_batch(windows, runtime.batch_windows),
        **runtime_identity(runtime),
    }

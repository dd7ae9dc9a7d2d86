"""One pass over all blocks: what calibration and repair have in common.

A visit does what it likes with each block and gives a result. The pass spills hidden states,
saves as it goes, resumes what was killed, shows progress and takes the time.

Shapes: N windows, T tokens, D hidden.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from cfsp.checkpoint.reading import fingerprint
from cfsp.engine.block_stream import StreamedBlock, stream_blocks, windows_in_batch
from cfsp.engine.hidden_states import HiddenInFile, HiddenInMemory, HiddenStates
from cfsp.engine.pass_state import Pace, PassState
from cfsp.engine.pass_times import PassTimes
from cfsp.engine.versions import versions
from cfsp.processes import Team
from cfsp.progress import token_progress

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.workplace import Workplace
    from cfsp.text.windows import Windows

logger = logging.getLogger(__name__)

T = TypeVar("T")


class ResultFiles(Protocol[T]):
    """How the result of a block is put on disk and read again, the same bit for bit."""

    def save(self, result: T, directory: Path, block: int) -> None:
        """Write the result of one block; it is complete on disk when this returns."""
        ...

    def load(self, directory: Path, block: int) -> T:
        """Read what `save` wrote."""
        ...


def pass_blocks(
    source: WeightSource,
    windows: Windows,
    visit: Callable[[StreamedBlock], T],
    files: ResultFiles[T],
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    batch_windows: int | None,
    place: Workplace | None,
    more_batch_sizes: Iterable[int] = (),
    may_stop_after: Callable[[int], bool] = lambda block: True,
    label: str | None = None,
    more_tokens: int = 0,
    team: Team | None = None,
) -> list[T]:
    """Let all windows pass all blocks, or those that a killed run left; return all results.

    Args:
        source: the model.
        windows: without padding.
        visit: advances a block and returns its result.
        files: puts results on disk.
        name: of the pass: its directory in the workplace.
        device: where blocks compute.
        dtype: what they compute in.
        batch_windows: windows that pass together; see `windows_in_batch`.
        place: where to spill and to save; None for neither.
        more_batch_sizes: see `stream_blocks`.
        may_stop_after: whether hidden states and results are all that a visit of the next block
            needs; if not, a killed pass goes on further back.
        label: what people read of the pass; None for its name.
        more_tokens: that visits report beyond those that pass the blocks.
        team: processes that do the same with other windows, and whose visits wait for each other;
            they save together and go on at the same block. None where visits do not wait.

    Raises:
        ResumeError: the workplace holds unfinished work of something else.
        OutputError: the disk is full.
    """
    label = label or name
    blocks = source.architecture.block_count
    state = None
    if place is not None and place.identity is not None:
        batch = windows_in_batch(windows, batch_windows)
        identity = _identity(source, windows, device, dtype, batch)
        state = PassState(place.directory / name, {**identity, **place.identity})
    team = team or Team()
    if state is not None and team.size > 1:
        _go_back_together(state, team)
    results: list[T] = []
    if state is not None and state.next_block:
        results = [files.load(state.directory, block) for block in range(state.next_block)]
        logger.info("%s: going on at block %d of %d", label, len(results), blocks)
    if len(results) == blocks:
        return results
    times = PassTimes() if place is None else place.times.setdefault(label, PassTimes())
    saver = None if state is None else _Saver(state, files, results, times, team)
    with (
        times.part("total"),
        token_progress(
            label, blocks, windows.tokens_NT.numel() * blocks + more_tokens, len(results)
        ) as progress,
    ):
        for block in stream_blocks(
            source,
            windows,
            device=device,
            dtype=dtype,
            batch_windows=batch_windows,
            on_batch=progress.tokens,
            open_hidden=_hidden_opener(name, state, place, pinned=device.type == "cuda"),
            first_block=len(results),
            more_batch_sizes=more_batch_sizes,
            times=times,
        ):
            with times.part("visits"):
                results.append(visit(block))
            progress.block_done()
            is_last, is_enough = block.index + 1 == blocks, may_stop_after(block.index)
            if saver is not None and not is_last and is_enough and not block.leaves_more:
                saver.block_done(block.hidden)
        if saver is not None:
            saver.all_done()
    return results


def _go_back_together(state: PassState, team: Team) -> None:
    """Go on at the last block that every process can go on at.

    Processes save together, so that a kill finds them at most one time apart.
    """
    reachable = team.gather({state.next_block, state.before[0], 0})
    state.go_back_to(max(set.intersection(*reachable)))


class _Saver:
    """Saves results and hidden states, as often as costs little."""

    def __init__(
        self,
        state: PassState,
        files: ResultFiles[Any],
        results: list[Any],
        times: PassTimes,
        team: Team,
    ) -> None:
        self._state, self._files, self._results, self._times = state, files, results, times
        self._team = team
        self._pace: Pace | None = None

    def block_done(self, hidden: HiddenStates) -> None:
        self._pace = self._pace or Pace(hidden.nbytes)
        if not self._team.from_first(self._pace.due):
            return
        start = time.monotonic()
        with self._times.part("saving"):
            self._save_results()
            self._state.commit(len(self._results), hidden.save())
            # Who goes on writes over what others would go back to.
            self._team.gather(None)
        self._pace.saved(time.monotonic() - start)

    def all_done(self) -> None:
        """Save the results; hidden states are no longer needed."""
        with self._times.part("saving"):
            self._save_results()
            self._state.commit(len(self._results), None)
            self._team.gather(None)
            for file in self._state.directory.glob("hidden-*.bin"):
                file.unlink()

    def _save_results(self) -> None:
        for block in range(self._state.next_block, len(self._results)):
            self._files.save(self._results[block], self._state.directory, block)


def _hidden_opener(
    name: str, state: PassState | None, place: Workplace | None, *, pinned: bool
) -> Callable[[tuple[int, ...], torch.dtype], HiddenStates]:
    """Return what makes room for hidden states: in memory, or beyond the budget in a file."""

    def open_hidden(shape_NTD: tuple[int, ...], dtype: torch.dtype) -> HiddenStates:
        if place is None:
            return HiddenInMemory(shape_NTD, dtype, pinned=pinned)
        directory, saved = place.directory_of(name), state.hidden if state else None
        nbytes = math.prod(shape_NTD) * dtype.itemsize
        if nbytes <= place.memory_budget:
            return HiddenInMemory(shape_NTD, dtype, directory, saved, pinned=pinned)
        logger.info(
            f"{name}: {nbytes / 1e9:.3g} GB of hidden states exceed the memory budget of "
            f"{place.memory_budget / 1e9:.3g} GB; they go to a file in {directory}"
        )
        return HiddenInFile(shape_NTD, dtype, directory, saved)

    return open_hidden


def _identity(
    source: WeightSource, windows: Windows, device: torch.device, dtype: torch.dtype, batch: int
) -> dict[str, Any]:
    """Return what the results of any pass depend on."""
    return {
        "model": source.label,
        "model fingerprint": fingerprint(source),
        "calibration text": windows.digest,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch of windows": batch,
        "version": {k: versions()[k] for k in ("cfsp-llm", "torch", "transformers")},
    }

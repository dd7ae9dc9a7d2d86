"""The work directory beside an output: what does not fit into memory, what a killed run left.

    OUT.work/process-0-of-1/coarse/state.json, hidden-0.bin, ...

It is gone when the output is there. After a kill it stays, and the same command goes on from
it; another command is refused. Nobody else works in it meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import exclusive, write_atomically
from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.errors import CfspError, OutputError, ResumeError
from cfsp.processes import Team
from cfsp.streaming.memory import default_budget
from cfsp.streaming.pass_state import STATE_FILE, PassState, read_state
from cfsp.streaming.stopwatch import PassTimes, Stopwatch

logger = logging.getLogger(__name__)


@dataclass
class WorkDir:
    """Where one command works, with whom, and what took how long."""

    # It exists as long as the command runs.
    directory: Path
    # Bytes of hidden states above which they go to a file.
    memory_budget: int = field(default_factory=default_budget)
    # What the results depend on besides model and text, as JSON types; None if a later run is not
    # to resume.
    identity: dict[str, Any] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    # Of each pass, by its name.
    times: dict[str, PassTimes] = field(default_factory=dict)
    team: Team = field(default_factory=Team)

    def directory_of(self, name: str) -> Path:
        """Return the directory of one pass; it exists."""
        directory = self.directory / name
        directory.mkdir(parents=True, exist_ok=True)
        return directory

    def first_directory_of(self, name: str) -> Path:
        """Return the directory of one pass where the first process works; there it exists."""
        if self.team.is_first:
            return self.directory_of(name)
        return self.directory.with_name(_directory_name(0, self.team.size)) / name

    def times_json(self) -> dict[str, dict[str, float]]:
        """Return the times of all passes."""
        return {name: times.to_json() for name, times in self.times.items()}


@contextmanager
def temporary_work_dir(memory_budget: int | None = None) -> Iterator[WorkDir]:
    """Give a work directory that nothing resumes from."""
    with tempfile.TemporaryDirectory(prefix="cfsp-") as directory:
        yield WorkDir(Path(directory), _budget(memory_budget))


@contextmanager
def output_work_dir(
    out: Path,
    identity: dict[str, Any],
    memory_budget: int | None = None,
    team: Team | None = None,
) -> Iterator[WorkDir]:
    """Give the work directory of an output, a file or directory; it is removed when all is done.

    What another run uses, or an unfinished one of another command or number of processes, is
    refused.
    """
    team = team or Team()
    directory = directory_of_process(out, team.rank, team.size)
    work_dir = directory.parent
    _check_processes(work_dir, team.size)
    with _working(directory):
        for state in sorted(directory.glob(f"*/{STATE_FILE}")):
            read_state(state, identity)
        _remove_unfinished(directory)
        try:
            yield WorkDir(directory, _budget(memory_budget), identity, team=team)
        except ResumeError:
            raise
        except BaseException as error:
            if _to_keep(directory, error):
                logger.warning(
                    "the work so far is kept in %s; the same command goes on from it", work_dir
                )
            else:
                _remove(directory)
            raise
        _remove(directory)


@contextmanager
def _working(directory: Path) -> Iterator[None]:
    """Keep other runs out of where a process works; at the end no empty directory stays."""
    try:
        with exclusive(directory):
            yield
    finally:
        with contextlib.suppress(OSError):  # others are still working there
            directory.parent.rmdir()


def load_or_compute(
    work_dir: WorkDir | None, name: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the JSON types that a killed run measured already, or measure and keep them."""
    if work_dir is None or work_dir.identity is None:
        return measure()
    state = PassState(work_dir.directory / name, work_dir.identity)
    path = state.directory / "measured.json"
    if not state.next_block:
        write_atomically(path, json.dumps(measure()).encode())
        state.commit(1, None)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def directory_of_process(out: Path, process: int = 0, processes: int = 1) -> Path:
    """Return where one process works on an output; see `output_work_dir`."""
    return out.parent / f"{out.name}.work" / _directory_name(process, processes)


def _directory_name(process: int, processes: int) -> str:
    return f"process-{process}-of-{processes}"


def _budget(memory_budget: int | None) -> int:
    return default_budget() if memory_budget is None else memory_budget


def _check_processes(work_dir: Path, processes: int) -> None:
    # Sorted: an iterator that an error leaves half way keeps its directory open.
    for state in sorted(work_dir.glob(f"process-*/*/{STATE_FILE}")):
        found = state.parent.parent.name.rpartition("-of-")[2]
        if found != str(processes):
            raise ResumeError(
                f"{work_dir} holds unfinished work of {found} processes, now there are "
                f"{processes}; repeat that command to finish it, or start over with: "
                f"rm -r {work_dir}"
            )


def _remove_unfinished(directory: Path) -> None:
    """Remove what a killed run cannot be resumed from."""
    for leftover in directory.iterdir():
        if leftover.is_dir() and not (leftover / STATE_FILE).is_file():
            shutil.rmtree(leftover, ignore_errors=True)


def _to_keep(directory: Path, error: BaseException) -> bool:
    """Return whether the same command could get further than it did."""
    if isinstance(error, CfspError) and not error.keeps_work:
        return False
    return bool(list(directory.glob(f"*/{STATE_FILE}")))


def remove_finished_work(out: Path) -> None:
    """Remove the work directory of an output that is there: its run may have been killed."""
    work_dir = out.parent / f"{out.name}.work"
    if not work_dir.is_dir() or not (out.is_file() or (out / MANIFEST_FILE).is_file()):
        return
    # A directory has its lock beside it.
    names = {path.name.removeprefix(".").removesuffix(".lock") for path in work_dir.iterdir()}
    for directory in sorted(work_dir / name for name in names):
        with contextlib.suppress(OSError, OutputError), _working(directory):
            _remove(directory)


def _remove(directory: Path) -> None:
    # First what says that there is something to go on from: a kill may come meanwhile.
    for state in sorted(directory.glob(f"*/{STATE_FILE}")):
        state.unlink()
    shutil.rmtree(directory, ignore_errors=True)

"""The work directory beside an output: what does not fit into memory, what a killed run left.

    OUT.work/process-0/ridge/state.json, hidden-00004.bin, ...

It is gone when the output is there. After a kill it stays, and the same command goes on from
it; another command is refused. Nobody else works in it meanwhile.

A pass resumes from `state.json`: how far it came, and what entered the next block. It is replaced
in one step, after everything that it speaks of is on disk, and says what the work belongs to.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cfsp.checkpoint.output import created_parents, exclusive, write_atomically
from cfsp.checkpoint.own_files import MANIFEST_FILE
from cfsp.errors import (
    OF_DAMAGE,
    CfspError,
    CheckpointError,
    OutputError,
    ResumeError,
    StatisticsError,
    TextError,
    UsageError,
)
from cfsp.processes import Team
from cfsp.streaming.memory import hidden_budget

logger = logging.getLogger(__name__)


STATE_FILE = "state.json"

_DIGEST = re.compile(r'"[0-9a-f]{16,}"')


class PassState:
    """The state of one pass, in a directory of its own; unfinished work of another is refused."""

    def __init__(self, directory: Path, identity: dict[str, Any]) -> None:
        self.directory, self._identity = directory, identity
        self.next_block = 0  # the first block that is not finished
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / STATE_FILE).is_file():
            self.next_block = read_state(directory / STATE_FILE, identity)["next_block"]

    def hidden_file(self, block: int) -> Path:
        """Return the file for the hidden states that enter a block."""
        return self.directory / f"hidden-{block:05d}.bin"

    @property
    def reachable(self) -> set[int]:
        """The blocks that the pass can begin with: the next, the first, and those saved before."""
        earlier = range(self.next_block)
        return {0, self.next_block, *(each for each in earlier if self.hidden_file(each).is_file())}

    def commit(self, next_block: int) -> None:
        """Note that all before a block is on disk."""
        self.next_block = next_block
        text = json.dumps({"identity": self._identity, "next_block": next_block}, indent=2) + "\n"
        write_atomically(self.directory / STATE_FILE, text.encode())

    def remove_earlier(self) -> None:
        """Remove the hidden states that enter other blocks than the next."""
        for file in self.directory.glob("hidden-*.bin"):
            if file != self.hidden_file(self.next_block):
                file.unlink()


def read_state(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Return what WORK_DIR/PROCESS/PASS/state.json says, if it is whole and of an identity."""
    work_dir = path.parents[2]
    with reading_work(path.parent, f"{path} is damaged"):
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        saved = dict(fields["identity"])
        fields["next_block"] = int(fields["next_block"])
    asked = json.loads(json.dumps(identity))
    # Of another command or version the rest may be called otherwise.
    for key in sorted(asked, key=lambda name: name not in ("command", "version")):
        before, now, again = saved.get(key), asked[key], "repeat that command"
        if key == "version" or key not in saved:
            again = "go back to the version that began it"
        if before != now:
            # Digests tell nobody anything.
            is_told = _DIGEST.search(json.dumps([before, now])) is None
            said = f" ({before}; now it is {now})" if is_told else ""
            raise ResumeError(
                f"{work_dir} holds unfinished work that differs in {key}{said}; {again} to finish "
                f"it, or {start_over(work_dir)}"
            )
    return fields


class Stopwatch:
    """Seconds spent in each named stage, without those in other stages within it."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return {name: round(spent, 3) for name, spent in self._spent.items()}

    def add(self, name: str, seconds: float) -> None:
        """Add what a stage took elsewhere, as in a run that was killed."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block of code to a stage."""
        self._spent.setdefault(name, 0.0)
        start, known = time.perf_counter(), sum(self._spent.values())
        try:
            yield
        finally:
            of_others = sum(self._spent.values()) - known
            self._spent[name] += max(0.0, time.perf_counter() - start - of_others)


class PassTimes(Stopwatch):
    """Seconds of one pass over the blocks, by part.

    total          the whole pass, embedding included
    visits         with a block in memory: its forward, the sums, repair if any
    hidden_states  within visits: between the hidden states and the device
    weights        waiting for weights that were not ready; moving and checking them
    saving         putting down what a killed run resumes from
    """

    def to_json(self) -> dict[str, float]:
        """Return seconds by part, those of pure computing, and total time as a multiple of them."""
        spent, total = self._spent, sum(self._spent.values())
        compute = spent.get("visits", 0.0)
        visits = compute + spent.get("hidden_states", 0.0)
        seconds = {**spent, "total": total, "visits": visits, "compute": compute}
        ratio = total / compute if compute > 0 else 1.0
        return {**{k: round(v, 3) for k, v in seconds.items()}, "ratio": round(ratio, 4)}


@dataclass
class WorkDir:
    """Where one command works, with whom, and what took how long."""

    directory: Path  # it exists as long as the command runs
    # Bytes of hidden states above which they go to a file.
    memory_budget: int = field(default_factory=hidden_budget)
    # What the results depend on besides model and text, as JSON types; None if a later run is not
    # to resume.
    identity: dict[str, Any] | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)
    times: dict[str, PassTimes] = field(default_factory=dict)  # of each pass, by its name
    team: Team = field(default_factory=Team)

    def directory_of(self, name: str) -> Path:
        """Return the directory of one pass; it exists."""
        directory = self.directory / name
        # A temporary one lies where all users see it.
        self.directory.mkdir(mode=0o700, exist_ok=True)
        directory.mkdir(exist_ok=True)
        return directory

    def first_directory_of(self, name: str) -> Path:
        """Return the directory of one pass where the first process works; there it exists."""
        if self.team.is_first:
            return self.directory_of(name)
        return self.directory.with_name("process-0") / name

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `load_or_compute` does in the first process; the others wait for it."""
        return self.team.from_first(lambda: load_or_compute(self, name, measure))

    def times_json(self) -> dict[str, dict[str, float]]:
        """Return the times of all passes."""
        return {name: times.to_json() for name, times in self.times.items()}


@contextmanager
def temporary_work_dir(memory_budget: int | None = None) -> Iterator[WorkDir]:
    """Give a work directory that nothing resumes from; it exists once something is put there."""
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:  # also of full disks: it tries to write
        raise OutputError(
            "no directory for temporary files can be written to; make room there, or set TMPDIR "
            "to one that can be"
        ) from error
    directory = Path(temporary) / f"cfsp-{secrets.token_hex(8)}"
    try:
        yield WorkDir(directory, hidden_budget(memory_budget))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def output_work_dir(
    out: Path, identity: dict[str, Any], memory_budget: int | None, team: Team | None = None
) -> Iterator[WorkDir]:
    """Give the work directory of an output, a file or directory; it is removed when all is done.

    What another run uses, or an unfinished one of another command or number of processes, is
    refused.
    """
    if team is not None:
        identity = {**identity, "number of processes": team.size}
    team = team or Team()
    directory = directory_of_process(out, team.rank)
    work_dir = directory.parent
    with created_parents(out), _working(directory):
        every = unfinished_in(work_dir)
        before = [state for state in every if team.is_first or directory in state.parents]
        for state in before:
            read_state(state, identity)
        _remove_unfinished(directory)
        if team.is_first:  # what more processes left cannot be gone on from
            own = {directory_of_process(out, process).name for process in range(team.size)}
            _remove_in(work_dir, lambda name: name not in own)
        try:
            yield WorkDir(directory, hidden_budget(memory_budget), identity, team=team)
        except ResumeError:
            raise
        except BaseException as error:
            if _to_keep(directory, error, goes_on=bool(before)):
                which = "command that began it" if before else "same command"
                logger.warning(
                    "the work so far is kept in %s; the %s goes on from it", work_dir, which
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
    work_dir: WorkDir, name: str, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Return the JSON types that a killed run measured already, or measure and keep them."""
    if work_dir.identity is None:
        return measure()
    state = PassState(work_dir.directory / name, work_dir.identity)
    path = state.directory / "measured.json"
    if not state.next_block:
        write_atomically(path, json.dumps(measure()).encode())
        state.commit(1)
    with reading_work(state.directory, f"{path} is gone or damaged"):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@contextmanager
def reading_work(directory: Path, wrong: str) -> Iterator[None]:
    """Turn what goes wrong while the work of a pass in its directory is read into one error.

    `wrong` says what is found then. The work stays: whoever reads that decides about it.
    """
    try:
        yield
    except (OSError, RecursionError, StatisticsError, *OF_DAMAGE) as error:
        raise ResumeError(f"{wrong}; {start_over(directory.parents[1])}") from error


def start_over(work_dir: Path) -> str:
    """Return the advice to remove unfinished work, which a shell takes as it is meant."""
    return f"start over with: rm -r {shlex.quote(str(work_dir))}"


def directory_of_process(out: Path, process: int = 0) -> Path:
    """Return where one process works on an output; see `output_work_dir`."""
    return out.parent / f"{out.name}.work" / f"process-{process}"


def unfinished_in(work_dir: Path) -> list[Path]:
    """Return the states of all passes that killed runs left, of all processes."""
    # Sorted: an iterator that an error leaves half way keeps its directory open.
    return sorted(work_dir.glob(f"process-*/*/{STATE_FILE}"))


def _remove_unfinished(directory: Path) -> None:
    """Remove what a killed run cannot be resumed from."""
    for leftover in directory.iterdir():
        if leftover.is_dir() and not (leftover / STATE_FILE).is_file():
            shutil.rmtree(leftover, ignore_errors=True)


def _to_keep(directory: Path, error: BaseException, *, goes_on: bool) -> bool:
    """Return whether the same command could get further than it did.

    What was given now may be wrong where an earlier run, on whose work it `goes_on`, was right.
    """
    of_input = (UsageError, TextError, CheckpointError)
    keeps = not isinstance(error, CfspError) or error.keeps_work
    if not keeps and not (goes_on and isinstance(error, of_input)):
        return False
    return bool(list(directory.glob(f"*/{STATE_FILE}")))


def remove_finished_work(out: Path) -> None:
    """Remove the work directory of an output that is there: its run may have been killed."""
    if out.is_file() or (out / MANIFEST_FILE).is_file():
        remove_work(out)


def remove_work(out: Path) -> None:
    """Remove the work directory of an output, but for what another run uses."""
    work_dir = out.parent / f"{out.name}.work"
    if work_dir.is_dir():
        _remove_in(work_dir, lambda name: True)


def _remove_in(work_dir: Path, goes: Callable[[str], bool]) -> None:
    # A directory has its lock beside it.
    names = {path.name.removeprefix(".").removesuffix(".lock") for path in work_dir.iterdir()}
    for directory in sorted(work_dir / name for name in names if goes(name)):
        with contextlib.suppress(OSError, OutputError), _working(directory):
            _remove(directory)


def _remove(directory: Path) -> None:
    # First what says that there is something to go on from: a kill may come meanwhile.
    for state in sorted(directory.glob(f"*/{STATE_FILE}")):
        state.unlink()
    shutil.rmtree(directory, ignore_errors=True)

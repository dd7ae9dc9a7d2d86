"""One process for each model: its peak memory is then its own, and models can take turns."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from cfsp.engine.memory import peak_rss_bytes
from cfsp.errors import CfspError
from cfsp.speed.disturbance import busy_seconds, share_of_others
from cfsp.speed.subjects import Footprint, Subject
from cfsp.speed.workload import Conditions, Timing, Workload

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

    from cfsp.speed.engine import Engine

# A fresh interpreter: a forked one would carry this process's memory.
PROCESSES: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
_STOP_SECONDS = 30.0
_INTERRUPTED_SECONDS = 1.0


@dataclass(frozen=True)
class Loaded:
    """What a process says when its model is ready.

    Attributes:
        footprint: parameters, bytes and work of the model.
        facts: of the engine.
        seconds: that loading took.
    """

    footprint: Footprint
    facts: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        timing: of its parts.
        cpu_seconds: that the process used, all threads together.
        disturbance: fraction of all processors that other programs took meanwhile.
    """

    timing: Timing
    cpu_seconds: float
    disturbance: float


@dataclass(frozen=True)
class Memory:
    """Peak memory of a process.

    Attributes:
        resident_bytes: host memory, weights mapped from files and libraries included.
        device_bytes: of an accelerator.
    """

    resident_bytes: int
    device_bytes: int


@dataclass(frozen=True)
class _Failure:
    """An error that a user can cure, as values: not every exception survives pickling."""

    kind: type[CfspError]
    message: str

    def as_error(self) -> CfspError:
        error = self.kind.__new__(self.kind, self.message)
        Exception.__init__(error, self.message)
        return error


class ModelProcess:
    """A process that holds one model; runs happen only when asked for."""

    def __init__(self, connection: Connection, loaded: Loaded) -> None:
        self._connection = connection
        self.loaded = loaded

    def run(self, workload: Workload) -> Run:
        """Time one run; no other model runs meanwhile."""
        run: Run = _ask(self._connection, workload)
        return run

    def memory(self) -> Memory:
        """Return the peak so far."""
        memory: Memory = _ask(self._connection, None)
        return memory


@contextmanager
def model_process(subject: Subject, conditions: Conditions) -> Iterator[ModelProcess]:
    """Start a process, load the model in it, and end it afterwards.

    Raises:
        CfspError: what loading the model raised in the process.
    """
    ours, theirs = PROCESSES.Pipe()
    # Not a daemon: vLLM starts processes of its own. It ends when the connection closes.
    process = PROCESSES.Process(target=_serve, args=(theirs, subject, conditions))
    with _interrupts_held_back():
        process.start()
    theirs.close()
    patience = _STOP_SECONDS
    try:
        loaded: Loaded = _receive(ours)
        yield ModelProcess(ours, loaded)
    except BaseException:
        patience = _INTERRUPTED_SECONDS
        raise
    finally:
        ours.close()
        process.join(patience)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let what is started meanwhile never see Ctrl-C, which goes to all processes of a terminal.

    It would only add a traceback: this process ends the others. Here a Ctrl-C comes afterwards.
    """
    if sys.platform == "win32":
        yield
        return
    # Starting this helper of multiprocessing would let signals through again.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _ask(connection: Connection, request: Workload | None) -> Any:
    # A process that has ended is found out when its answer is awaited.
    with suppress(ConnectionError):
        connection.send(request)
    return _receive(connection)


def _receive(connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise CfspError(
            "the process that ran the model ended without an answer, most likely for lack of "
            "memory; bench fewer --blocks or a smaller model"
        ) from error
    if isinstance(answer, _Failure):
        raise answer.as_error()
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


def _serve(connection: Connection, subject: Subject, conditions: Conditions) -> None:
    from cfsp.speed.engine import start_engine

    # Runtimes print as they like; standard output is for the results.
    os.dup2(2, 1)
    try:
        start = time.perf_counter()
        engine = start_engine(subject, conditions)
        seconds = time.perf_counter() - start
        connection.send(Loaded(engine.footprint, engine.facts(), seconds))
        while True:
            request = connection.recv()
            if isinstance(request, Workload):
                connection.send(_run(engine, request))
            else:
                connection.send(Memory(peak_rss_bytes(), engine.peak_device_bytes()))
    except (EOFError, ConnectionError):
        # The other side has gone.
        return
    except CfspError as error:
        connection.send(_Failure(type(error), str(error)))
    except Exception as error:
        # As text: not every exception survives pickling.
        connection.send(RuntimeError("".join(traceback.format_exception(error))))


def _run(engine: Engine, workload: Workload) -> Run:
    # A collection in the middle of a run would be timed with it.
    gc.collect()
    gc.disable()
    busy, cpu, wall = busy_seconds(), time.process_time(), time.perf_counter()
    timing = engine.run(workload)
    own, spent = time.process_time() - cpu, time.perf_counter() - wall
    share = share_of_others(busy, busy_seconds(), own, spent)
    gc.enable()
    return Run(timing, own, share)

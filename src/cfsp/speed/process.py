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
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import psutil

from cfsp.errors import CfspError
from cfsp.speed.engines import Engine, LlamaCppEngine, TransformersEngine
from cfsp.speed.subjects import Subject
from cfsp.speed.work import Conditions, Footprint, Timing, Workload
from cfsp.streaming.memory import peak_rss_bytes

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

# A fresh interpreter: a forked one would carry this process's memory.
PROCESSES: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
_STOP_SECONDS = 30.0
_INTERRUPTED_SECONDS = 1.0
# Not idle, not waiting for a disk, not taken by another virtual machine. Some systems lack some.
_WORK = ("user", "nice", "system", "irq", "softirq")


@dataclass(frozen=True)
class ModelProcess:
    """A process that holds one model; runs happen only when asked for."""

    connection: Connection
    footprint: Footprint
    facts: dict[str, Any]  # of the engine
    load_seconds: float  # from start to ready

    def run(self, workload: Workload) -> Timing:
        """Time one run; no other model runs meanwhile."""
        timing: Timing = self._ask(workload)
        return timing

    def peak_bytes(self) -> tuple[int, int]:
        """Return the peak so far, of host memory and of an accelerator's.

        Weights mapped from files and libraries are in it.
        """
        peak: tuple[int, int] = self._ask(None)
        return peak

    def _ask(self, request: Workload | None) -> Any:
        # A process that has ended is found out when its answer is awaited.
        with suppress(ConnectionError):
            self.connection.send(request)
        return _receive(self.connection)


@contextmanager
def model_process(subject: Subject, conditions: Conditions) -> Iterator[ModelProcess]:
    """Start a process, load the model in it, and end it afterwards; its errors are raised here."""
    ours, theirs = PROCESSES.Pipe()
    # It ends when the connection closes.
    process = PROCESSES.Process(target=_serve, args=(theirs, subject, conditions))
    with _interrupts_held_back():
        process.start()
    theirs.close()
    patience = _STOP_SECONDS
    try:
        yield ModelProcess(ours, *_receive(ours))
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


def _receive(connection: Connection) -> Any:
    try:
        kind, answer = connection.recv()
    except (EOFError, ConnectionError) as error:
        raise CfspError(
            "the process that ran the model ended without an answer, most likely for lack of "
            "memory; bench a smaller model"
        ) from error
    if kind is None:
        return answer
    raised = kind.__new__(kind)
    Exception.__init__(raised, answer)
    raise raised


def start_engine(subject: Subject, conditions: Conditions) -> Engine:
    """Load a subject into an engine."""
    build = LlamaCppEngine if conditions.engine == "llama.cpp" else TransformersEngine
    return build(subject, conditions)


def _serve(connection: Connection, subject: Subject, conditions: Conditions) -> None:
    """Answer with (None, what was asked for) or, as not every error survives pickling, with text.

    First comes what a `ModelProcess` knows of its model.
    """
    # Runtimes print as they like; standard output is for the results.
    os.dup2(2, 1)
    try:
        start = time.perf_counter()
        engine = start_engine(subject, conditions)
        seconds = time.perf_counter() - start
        connection.send((None, (engine.footprint, engine.facts, seconds)))
        while True:
            request = connection.recv()
            if request is None:
                connection.send((None, (peak_rss_bytes(), engine.peak_device_bytes())))
            else:
                connection.send((None, _run(engine, request)))
    except (EOFError, ConnectionError):
        # The other side has gone.
        return
    except CfspError as error:
        connection.send((type(error), str(error)))
    except Exception as error:
        connection.send((RuntimeError, "".join(traceback.format_exception(error))))


def _run(engine: Engine, workload: Workload) -> Timing:
    # A collection in the middle of a run would be timed with it.
    gc.collect()
    gc.disable()
    busy, cpu, wall = busy_seconds(), time.process_time(), time.perf_counter()
    timing = engine.run(workload)
    own, spent = time.process_time() - cpu, time.perf_counter() - wall
    share = share_of_others(busy_seconds() - busy, own, spent)
    gc.enable()
    return replace(timing, disturbance=share)


def busy_seconds() -> float:
    """Return the CPU seconds that all processors together have worked since the machine began."""
    times = psutil.cpu_times()
    return float(sum(getattr(times, kind, 0.0) for kind in _WORK))


def share_of_others(busy: float, own: float, wall: float) -> float:
    """Return the fraction of all processors that other programs took during a run.

    All processors worked `busy` CPU seconds, the process that ran `own`, in `wall` seconds.
    """
    return max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if wall > 0 else 0.0

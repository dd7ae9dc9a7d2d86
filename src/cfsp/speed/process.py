"""One process for each model: its peak memory is then its own, and models can take turns."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import psutil

from cfsp.errors import CfspError
from cfsp.speed.subjects import Conditions, Engine, Footprint, Subject, Timing, Workload
from cfsp.streaming.memory import peak_rss_bytes

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

# A fresh interpreter: a forked one would carry this process's memory.
PROCESSES: SpawnContext | ForkServerContext = multiprocessing.get_context("spawn")
# Not idle, not waiting for a disk, not taken by another virtual machine. Some systems lack some.
_WORK = ("user", "nice", "system", "irq", "softirq")


@dataclass(frozen=True)
class ModelProcess:
    """A process that holds one model; runs happen only when asked for."""

    executor: ProcessPoolExecutor
    footprint: Footprint
    facts: dict[str, Any]  # of the engine
    load_seconds: float  # from start to ready

    def run(self, workload: Workload) -> Timing:
        """Time one run; no other model runs meanwhile."""
        timing: Timing = _asked(self.executor, _run, workload)
        return timing

    def peak_bytes(self) -> tuple[int, int]:
        """Return the peak so far, of host memory (mapped files too) and of an accelerator's."""
        peak: tuple[int, int] = _asked(self.executor, _peak_bytes)
        return peak


@contextmanager
def model_process(subject: Subject, conditions: Conditions) -> Iterator[ModelProcess]:
    """Start a process, load the model in it, and end it afterwards; its errors are raised here."""
    # Ctrl-C goes to all processes of a terminal: this one ends the others.
    executor = ProcessPoolExecutor(1, PROCESSES)
    others = set(multiprocessing.active_children())
    with _interrupts_held_back():
        executor.submit(os.getpid)  # starts it
    try:
        yield ModelProcess(executor, *_asked(executor, _load, subject, conditions))
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # it may be in the middle of a run
        raise
    finally:
        executor.shutdown()


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Let what is started meanwhile never see Ctrl-C: it would only add a traceback."""
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


def _asked(executor: ProcessPoolExecutor, ask: Callable[..., Any], *given: Any) -> Any:
    """Return what a function gives in the process; its errors are raised here."""
    try:
        return executor.submit(ask, *given).result()
    except BrokenProcessPool as error:
        raise CfspError(
            "the process that ran the model ended without an answer, most likely for lack of "
            "memory; bench a smaller model"
        ) from error


# The engine of a process that holds one.
_engine: list[Engine] = []


def _load(subject: Subject, conditions: Conditions) -> tuple[Footprint, dict[str, Any], float]:
    """Load the model, in the process; return what a `ModelProcess` knows of it."""
    # Runtimes print as they like; standard output is for the results.
    os.dup2(2, 1)
    start = time.perf_counter()
    _engine.append(Engine(subject, conditions))
    return _engine[0].footprint, _engine[0].facts, time.perf_counter() - start


def _peak_bytes() -> tuple[int, int]:
    return peak_rss_bytes(), _engine[0].peak_device_bytes()


def _run(workload: Workload) -> Timing:
    # A collection in the middle of a run would be timed with it.
    gc.collect()
    gc.disable()
    busy, cpu, wall = busy_seconds(), time.process_time(), time.perf_counter()
    timing, _ = _engine[0].run(workload)
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

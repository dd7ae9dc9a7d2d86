"""Several processes that work on one thing, as torchrun starts them.

    torchrun --nproc-per-node 4 -m cfsp prune MODEL --sparsity 0.5 --out smaller ...

Importing this does not import torch.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

from cfsp.errors import CfspError, ProcessError, UsageError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")

PATIENCE_SECONDS = 1800.0  # the fastest process waits so long for the slowest
_FIRST_SECONDS = 7 * 86400.0  # the others wait so long for what the first does alone
# Machines may begin this long after each other, however little they may differ at the end.
_START_SECONDS = 1800.0
_GROUPS = count()  # of this process, one after the other
# Of gloo's errors, and of torch's own.
_LOST = re.compile("Dist[A-Z][a-z]+Error|gloo|[Cc]onnection (closed|reset)|[Tt]imed out")


def process_rank() -> int:
    """Return the number of this process among those that torchrun started; 0 without it."""
    return _told("RANK", 0) if process_count() > 1 else 0


def is_first_process() -> bool:
    """Return whether this process is the only one or the first of several."""
    return process_rank() == 0


def process_count() -> int:
    """Return how many processes torchrun started; 1 without it, as where the variable is empty."""
    return _told("WORLD_SIZE", 1)


def check_is_alone(
    what: str, instead: str = "start it without torchrun, or unset WORLD_SIZE and RANK"
) -> None:
    """Refuse what one process does under torchrun, where each would do all of it at once."""
    if process_count() > 1:
        raise UsageError(f"{what} runs in one process, found {process_count()}; {instead}")


def processes_on_machine() -> int:
    """Return how many processes torchrun started on this machine; 1 without it."""
    return _told("LOCAL_WORLD_SIZE", 1)


def _told(variable: str, otherwise: int) -> int:
    """Return the number that torchrun left in the environment; UsageError if it is none.

    It is at least what it is without torchrun.
    """
    text = os.environ.get(variable) or str(otherwise)
    if not text.isdecimal() or int(text) < otherwise:
        raise UsageError(
            f"{variable} must be a whole number, as torchrun sets it, {otherwise} or more, found "
            f"{text!r}; unset it, or start with torchrun"
        )
    return int(text)


@dataclass(frozen=True)
class Team:
    """The processes of a job, seen from one of them.

    What is exchanged has an order that does not change from run to run. Whoever waits for a process
    that died, or is not there in time, raises ProcessError.
    """

    rank: int = 0
    size: int = 1
    # The group that they wait in; on the CPU also where they compute elsewhere, because only that
    # one names who is missing.
    barrier: ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the output."""
        return self.rank == 0

    def share(self, count: int, batch: int = 1) -> slice:
        """Return which of so many things are this process's: whole batches, shared evenly.

        None has more than the first, which waits for the others only for a while.
        """
        batches = -(-count // batch)
        first, end = (-(-rank * batches // self.size) for rank in (self.rank, self.rank + 1))
        return slice(first * batch, min(end * batch, count))

    def add_up_at(self, rank: int, tensors: Iterable[Tensor]) -> None:
        """Replace tensors of one of several processes, which are contiguous, by sums over all."""
        with self._exchange() as dist:
            for numbers in tensors:
                dist.reduce(numbers, dst=rank)

    def gather(self, value: T, at: int | None = None) -> list[T]:
        """Return what every process has, in their order; if one is named, nothing in the others."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        is_here = at in (None, self.rank)
        with self._exchange() as dist:
            if at is None:
                dist.all_gather_object(found, value, group=self.barrier)
            else:
                own = found if is_here else None
                dist.gather_object(value, own, dst=at, group=self.barrier)
        return found if is_here else []

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; the others wait for it, and fail as it does."""
        return self.each_does(lambda: make() if self.is_first else cast("T", None))[0]

    def each_does(self, do: Callable[[], T]) -> list[T]:
        """Return what every process made, in their order; if one fails, all do."""
        if self.size == 1:
            return [do()]
        outcome: Any
        try:
            outcome = do(), None
        except CfspError as error:
            outcome = None, error
        found = self.gather(outcome)
        for _made, failure in found:
            if failure is not None:
                raise failure
        return [made for made, _failure in found]

    def check_same(self, facts: Mapping[str, str]) -> None:
        """Check that all processes work on the same thing: facts by name."""
        of_all = self.gather(dict(facts))
        for rank, found in enumerate(of_all):
            for name, expected in of_all[0].items():
                if found[name] != expected:
                    raise UsageError(
                        f"process {rank} has another {name} than process 0 ({found[name]}; there "
                        f"it is {expected}); give all processes the same files, versions and "
                        "arguments"
                    )

    @contextmanager
    def _exchange(self) -> Iterator[Any]:
        """Wait for all processes before they exchange something; give `torch.distributed`."""
        import torch.distributed as dist

        # The first may work for hours where the others have nothing to do; they see it end.
        seconds = PATIENCE_SECONDS if self.is_first else _FIRST_SECONDS
        try:
            dist.monitored_barrier(self.barrier, timedelta(seconds=seconds), wait_all_ranks=True)
            yield dist
        except RuntimeError as error:
            raise ProcessError(
                f"process {self.rank} of {self.size} lost another process, or waited for it longer "
                f"than {seconds:.0f} s ({first_line(error)}); see what that one printed"
            ) from error


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn what other libraries' exchanges say of a process that died into a ProcessError."""
    try:
        yield
    except RuntimeError as error:
        if process_count() == 1 or not _LOST.search(f"{type(error).__name__} {error}"):
            raise
        raise ProcessError(
            f"process {process_rank()} of {process_count()} lost another process "
            f"({first_line(error)}); see what that one printed"
        ) from error


def end_with_parent() -> None:
    """Let this process, which multiprocessing started, end when the one that did so is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def take_own_accelerator(device: str) -> None:
    """Let each process of a machine compute on an accelerator of its own, if there are enough.

    To be called before anything touches it, with what the user named: `auto`, or a device.
    """
    if process_count() == 1 or device == "cpu":
        return
    import torch

    if ":" in device:
        raise UsageError(
            f"--device {device} names one accelerator for {process_count()} processes; "
            f"with --device {device.partition(':')[0]} each takes its own"
        )
    if torch.accelerator.is_available():
        own = _told("LOCAL_RANK", 0) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(own)


@cache
def _store() -> Any:
    """Return where the processes leave word for each other: one for all groups of this process."""
    from torch.distributed.rendezvous import rendezvous

    patience = timedelta(seconds=_START_SECONDS)
    return next(rendezvous("env://", process_rank(), process_count(), timeout=patience))[0]


@contextmanager
def joined(device: torch.device) -> Iterator[Team]:
    """Give the team that torchrun started; without torchrun a team of one."""
    if process_count() == 1:
        yield Team()
        return
    import torch.distributed as dist

    rank, size, backend = process_rank(), process_count(), "gloo"
    if device.type != "cpu":
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    if dist.is_initialized():
        raise UsageError(
            "this process is in a group of torch.distributed already, and cfsp opens one of its "
            "own: call it before init_process_group, or after destroy_process_group"
        )
    try:
        # What an earlier group left there would be read as this one's.
        store = dist.PrefixStore(f"cfsp-{next(_GROUPS)}", _store())  # type: ignore[attr-defined]
        patience = timedelta(seconds=_START_SECONDS)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
        # Of all but the first a wait takes no longer than their group was made for.
        longest = timedelta(seconds=_FIRST_SECONDS)
        team = Team(rank, size, dist.new_group(backend="gloo", timeout=longest))
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"process {rank} of {size} cannot reach the others: {first_line(error)}; start all "
            "with torchrun"
        ) from error
    try:
        yield team
    finally:
        # The threads of a group that is still there when the interpreter ends may abort the
        # process; torchrun then stops the others, which may be writing. A trainer and its wrapped
        # model refer to each other, and to the group.
        gc.collect()
        dist.destroy_process_group()

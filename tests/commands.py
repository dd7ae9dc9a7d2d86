"""Commands in processes of their own, which may kill themselves.

A command that is told to die does so by a real `kill -9` of its own process.
"""

import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from forks import Finished, Forks, Job


@dataclass(frozen=True)
class Command:
    """What follows `cfsp`, and when its process dies."""

    argv: Sequence[str]
    # `within` or `after` a block, `training`, or `writing` the output; `terminated` by SIGTERM
    # after a block.
    dies: str | None = None
    # Of blocks that windows have passed then, over all passes, from 1; or of the step of training.
    count: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    patience: float = 1800  # seconds that it waits for the other processes


class Commands:
    """Runs commands in forks."""

    def __init__(self, forks: Forks) -> None:
        self._forks = forks

    def __call__(self, *commands: Command) -> list[Finished]:
        """Run commands side by side and wait for all."""
        arguments = [asdict(command) for command in commands]
        environments = [each.pop("environment") for each in arguments]
        return self._forks(*map(partial(Job, "commands.run"), arguments, environments))

    def together(
        self,
        argv: Sequence[str],
        size: int,
        dying: Iterable[int],
        dies: str,
        count: int,
        patience: float = 1800,
    ) -> list[Finished]:
        """Run a command in processes that work together, of which some die."""
        deaths = [(dies, count) if rank in dying else (None, 0) for rank in range(size)]
        each = zip(deaths, ranks(size), strict=True)
        return self(*(Command(argv, *death, rank, patience) for death, rank in each))

    def finish(self, argv: Sequence[str], size: int) -> list[Finished]:
        """Run a command in processes that work together to its end."""
        ended = self(*(Command(argv, environment=rank) for rank in ranks(size)))
        assert [each.status for each in ended] == [0] * size, ended
        return ended

    def kill(self, argv: Sequence[str], dies: str, count: int) -> None:
        """Run a command that dies, and check that it did."""
        (ended,) = self(Command(argv, dies, count))
        assert ended.status == -signal.SIGKILL, ended.stderr


def ranks(size: int) -> list[dict[str, str]]:
    """Return the environments of processes that work together, as torchrun sets them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    team = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # Each on the CPU, whatever else is there.
    team["CUDA_VISIBLE_DEVICES"] = ""
    return [{**team, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def run(argv: list[str], dies: str | None, count: int, patience: float) -> int:
    """Run one command in this process: called in a fork."""
    prepare(dies, count)
    from cfsp import processes
    from cfsp.cli import main

    processes.PATIENCE_SECONDS = patience

    return main(argv)


def prepare(dies: str | None, count: int) -> None:
    """Make this process save after every block and die where it is to."""
    import cfsp.pipeline as pipeline
    import cfsp.streaming.block_pass as block_pass
    from cfsp.streaming.block_stream import StreamedBlock

    block_pass.SHARE_OF_TIME = float("inf")
    passed = 0

    def die(*args: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def advance(
        block: Any, on_activations: Any = None, on_hidden: Any = lambda *states: None, *others: Any
    ) -> None:
        nonlocal passed
        passed += 1
        if dies == "within" and passed == count:
            # One batch of the block has passed.
            inner = on_hidden
            on_hidden = lambda *states: (inner(*states), die())  # noqa: E731
        original_advance(block, on_activations, on_hidden, *others)

    def block_done(saver: Any, hidden: Any) -> None:
        original_block_done(saver, hidden)
        if dies == "after" and passed == count:
            die()
        if dies == "terminated" and passed == count:
            os.kill(os.getpid(), signal.SIGTERM)

    original_advance, StreamedBlock.advance = StreamedBlock.advance, advance
    original_block_done = block_pass._Saver.block_done
    block_pass._Saver.block_done = block_done
    if dies == "training":
        die_at_step(count, die)
    if dies == "writing":
        pipeline.copy_travelling_files = die


def die_at_step(count: int, die: Callable[..., None]) -> None:
    """Make training die as a step begins."""
    from cfsp.recovery.trainer import RecoveryTrainer

    def training_step(trainer: Any, *args: Any, **options: Any) -> Any:
        if trainer.state.global_step + 1 == count:
            die()
        return original(trainer, *args, **options)

    original, RecoveryTrainer.training_step = RecoveryTrainer.training_step, training_step

"""Commands in processes of their own, which may kill themselves, without importing torch each time.

As a script it is a server: it imports everything once and forks for every command. `Commands` is
its client. A command that is told to die does so by a real `kill -9` of its own process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        argv: what follows `cfsp`.
        dies: `within` or `after` a block, or `writing` the output; None to live.
        count: of blocks that windows have passed then, over all passes, from 1.
        environment: more variables.
    """

    argv: Sequence[str]
    dies: str | None = None
    count: int = 0
    environment: dict[str, str] | None = None


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit status or minus the signal, and its standard error."""

    status: int
    stderr: str


class Commands:
    """Runs commands; a context manager."""

    def __enter__(self) -> Commands:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()

    def __call__(self, *commands: Command) -> list[Finished]:
        """Run commands side by side and wait for all."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps([vars(command) for command in commands]), file=self._server.stdin)
        self._server.stdin.flush()
        return [Finished(**ended) for ended in json.loads(self._server.stdout.readline())]

    def kill(self, argv: Sequence[str], dies: str, count: int) -> None:
        """Run a command that dies, and check that it did."""
        (ended,) = self(Command(argv, dies, count))
        assert ended.status == -signal.SIGKILL, ended.stderr


def serve() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as scratch:
            jobs = json.loads(line)
            logs = [Path(scratch) / str(number) for number in range(len(jobs))]
            children = [start(job, log) for job, log in zip(jobs, logs, strict=True)]
            ended = [
                {
                    "status": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]),
                    "stderr": log.read_text(),
                }
                for child, log in zip(children, logs, strict=True)
            ]
        print(json.dumps(ended), flush=True)


def start(job: dict[str, Any], log: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(job["environment"] or {})
        prepare(job["dies"], job["count"])
        from cfsp.cli import main

        status = main(job["argv"])
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)


def prepare(dies: str | None, count: int) -> None:
    """Make this process save after every block and die where it is to."""
    import cfsp.engine.block_pass as block_pass
    import cfsp.engine.pass_state as pass_state
    import cfsp.pipeline as pipeline
    from cfsp.engine.block_stream import StreamedBlock

    pass_state.SHARE_OF_TIME = float("inf")
    passed = 0

    def die(*args: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def advance(block: Any, on_activations: Any, on_hidden: Any) -> None:
        nonlocal passed
        passed += 1
        if dies == "within" and passed == count:
            # One batch of the block has passed.
            inner = on_hidden
            on_hidden = lambda *states: (inner(*states), die())  # noqa: E731
        original_advance(block, on_activations, on_hidden)

    def block_done(saver: Any, hidden: Any) -> None:
        original_block_done(saver, hidden)
        if dies == "after" and passed == count:
            die()

    original_advance, StreamedBlock.advance = StreamedBlock.advance, advance
    original_block_done = block_pass._Saver.block_done
    block_pass._Saver.block_done = block_done
    if dies == "writing":
        pipeline.write_config = die


if __name__ == "__main__":
    serve()

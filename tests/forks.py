"""Fresh processes, without importing torch anew for each: a server that has it forks for every job.

As a script it is the server; `Forks` is its client. The server never imports cfsp, so a job starts
without it, as a new interpreter would. Only commands, which begin by importing it, are forked from
a fork of the server that has.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Self, TextIO

# What takes long to import and what most jobs need.
IMPORTED = ("transformers.models.llama.modeling_llama", "transformers.trainer", "peft")
COMMAND = "commands.run"
IMPORTED_BY_COMMANDS = (
    "cfsp.cli", "cfsp.pipeline", "cfsp.quality.evaluate", "cfsp.recovery.recover",
    "cfsp.recovery.trainer", "commands",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A function to call in a process of its own."""

    function: str  # `module.function`, of a module in tests/
    arguments: dict[str, Any]  # by name, as JSON can hold them
    # More variables; what transformers read at its import stays as it was.
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """How a job ended: its exit status or minus the signal, and what it printed."""

    status: int
    stdout: str
    stderr: str


class Forks:
    """Runs jobs; a context manager."""

    def __enter__(self) -> Self:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Only a process of one thread can be forked at will.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._server.communicate()

    def __call__(self, *jobs: Job) -> list[Finished]:
        """Run jobs side by side and wait for all."""
        assert self._server.stdin is not None and self._server.stdout is not None
        print(json.dumps([asdict(job) for job in jobs]), file=self._server.stdin, flush=True)
        return [Finished(**ended) for ended in json.loads(self._server.stdout.readline())]

    def code(self, code: str, *environments: dict[str, str]) -> list[Finished]:
        """Run lines of Python to their end: once, or in all of these environments side by side."""
        arguments = {"code": code}
        ended = self(*(Job("forks.run_code", arguments, each) for each in environments or ({},)))
        assert [each.status for each in ended] == [0] * len(ended), ended
        return ended


def serve() -> None:
    from shortcuts import take_shortcuts

    prepare(IMPORTED)
    take_shortcuts()
    of_commands: tuple[TextIO, TextIO] | None = None
    for line in sys.stdin:
        if json.loads(line)[0]["function"] == COMMAND:
            questions, answers = of_commands = of_commands or forked_server()
            print(line, end="", file=questions, flush=True)
            print(answers.readline().rstrip(), flush=True)
        else:
            print(answer(line), flush=True)


def forked_server() -> tuple[TextIO, TextIO]:
    """Fork a server of commands; return what it reads and what it writes."""
    (asked, questions), (answers, answered) = os.pipe(), os.pipe()
    if os.fork():
        os.close(asked)
        os.close(answered)
        return os.fdopen(questions, "w"), os.fdopen(answers)
    os.close(questions)
    os.close(answers)
    prepare(IMPORTED_BY_COMMANDS)
    with os.fdopen(asked) as lines, os.fdopen(answered, "w") as out:
        for line in lines:
            print(answer(line), file=out, flush=True)
    os._exit(0)


def prepare(modules: Iterable[str]) -> None:
    """Import modules, and keep them from the collector, which would walk through them in forks."""
    for module in modules:
        import_module(module)
    # A thousand patterns are compiled once.
    import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("llama")
    # The configs of all models, which an Auto class names where it has none for a model.
    auto = import_module("transformers.models.auto.modeling_auto")
    for of in ("CausalLM", "ImageTextToText", "SequenceClassification", "TokenClassification"):
        list(getattr(auto, f"AutoModelFor{of}")._model_mapping)
    gc.freeze()


def answer(line: str) -> str:
    """Run the jobs of a line side by side; return how they ended, as a line."""
    with tempfile.TemporaryDirectory() as scratch:
        jobs = [Job(**job) for job in json.loads(line)]
        places = [Path(scratch) / str(number) for number in range(len(jobs))]
        children = [start(job, place) for job, place in zip(jobs, places, strict=True)]
        return json.dumps([asdict(wait(*each)) for each in zip(children, places, strict=True)])


def wait(child: int, place: Path) -> Finished:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Finished(status, (place / "stdout").read_text(), (place / "stderr").read_text())


def start(job: Job, place: Path) -> int:
    """Fork, call the function, and exit with the status that it returns, None being 0."""
    place.mkdir()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(job.environment)
        module, _, function = job.function.rpartition(".")
        status = getattr(import_module(module), function)(**job.arguments) or 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(status)


def run_code(code: str) -> None:
    """Run lines of Python: a job for what is too short for a function of its own."""
    exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
    serve()

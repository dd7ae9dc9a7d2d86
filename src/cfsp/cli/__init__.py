"""The console script `cfsp`: parses, calls one function, prints.

Nothing here imports torch before the arguments are parsed, so that help answers at once.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from cfsp.checkpoint.locating import given_path
from cfsp.cli.options import Parser, add_command, expand_sets
from cfsp.cli.output import show_messages, tell
from cfsp.errors import CfspError, UsageError, did_you_mean, first_line
from cfsp.processes import process_count, process_rank

# In the order of the help; each in the file of its name, but `eval` is in evaluate.py.
_NAMES = (
    "prune recover calibrate eval compare inspect families bench export report sweep verify demo"
)
COMMANDS = {
    name: import_module(f"cfsp.cli.{'evaluate' if name == 'eval' else name}")
    for name in _NAMES.split()
}

_DESCRIPTION = """\
Make a decoder-only LLM smaller and faster: remove its weakest FFN channels, or other parts, by
one pass over some text, repair what is left, and write an ordinary dense checkpoint.
"""

_EXAMPLES = """\
examples:
  cfsp demo --out pruned-demo
  cfsp prune meta-llama/Llama-3.2-1B --sparsity 0.2 --data wikitext2 --data c4 --out smaller
  cfsp eval meta-llama/Llama-3.2-1B smaller --data wikitext2 --data c4

`cfsp COMMAND --help` explains one command.
"""

_AT_ONCE_SECONDS = 3.0


def build_parser() -> Parser:
    """Return the parser with all subcommands."""
    parser = Parser(
        prog="cfsp",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        add_command(subparsers, name, command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for an error that the user can cure, 130 for an interruption."""
    parser, argv = build_parser(), sys.argv[1:] if argv is None else argv
    first = argv[0].partition("=")[0] if argv else ""
    if first.startswith("-") and first not in (own_flags := parser.known_flags()):
        hint = did_you_mean(first, own_flags)
        parser.error(
            f"unknown argument {first}{hint}"
            if hint
            else f"{first} stands before the command, expected behind it"
        )
    try:
        expanded = expand_sets(argv)
    except UsageError as error:
        parser.error(str(error))
    args, unknown = parser.parse_known_args(expanded, argparse.Namespace(argv=argv))
    if unknown:
        own = parser if args.command is None else args.parser
        flag = unknown[0].partition("=")[0]
        hint = "" if flag.startswith("-") else own.how_to_repeat(expanded, unknown[0])
        own.error(f"unknown argument {unknown[0]}{hint or did_you_mean(flag, own.known_flags())}")
    if args.version:
        from importlib.metadata import version

        print(f"cfsp {version('cfsp-llm')}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    if threading.current_thread() is threading.main_thread():
        # A polite kill must clean up as Ctrl-C does.
        stop = _Stop()
        signal.signal(signal.SIGTERM, stop)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, stop)
    show_messages()
    try:
        from cfsp.checkpoint.output import output_path

        _check_current_directory()
        for name, given in list(vars(args).items()):
            if isinstance(given, Path):  # a shell leaves the home directory in --out=~/x as it is
                setattr(args, name, output_path(given) if name == "out" else given_path(given))
            elif isinstance(given, list):
                setattr(args, name, [given_path(x) if isinstance(x, Path) else x for x in given])
        tell(args.run(args), as_json=args.json)
    except CfspError as error:
        return _ended(args.command, str(error), error.exit_status)
    except (RuntimeError, MemoryError) as error:
        if not (why := _full_memory(error)):
            raise
        return _ended(args.command, why, CfspError.exit_status)
    except KeyboardInterrupt:
        print(f"\ncfsp {args.command}: interrupted; nothing is half-written", file=sys.stderr)
        return 130
    except _TerminatedError as stop:
        reason = " (torchrun does that when another process fails)" if process_count() > 1 else ""
        return _ended(args.command, f"terminated{reason}; nothing is half-written", stop.status)
    return 0


def _full_memory(error: Exception) -> str:
    """Return in words that memory is full; empty if it is another error."""
    less = "smaller batches (batch_windows), shorter windows (seqlen)"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it may not be imported yet
        return (
            f"the memory of the accelerator is full ({first_line(error)}); {less} and --device cpu "
            "take less"
        )
    # As under `ulimit -v`; where there is no such limit the system kills the process instead.
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return (
            f"memory is full, or what a limit leaves of it ({first_line(error)}); {less} take less"
        )
    return ""


def _check_current_directory() -> None:
    """Check that there is one: without it what computes aborts the process."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(
            "the current directory is not there any more; change to another one and give the "
            "command again"
        ) from error


def step(*arguments: object) -> None:
    """Print and run one command of a script that is made of them."""
    argv = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['cfsp', *argv])}", file=sys.stderr, flush=True)
    if status := main(argv):
        raise SystemExit(status)


class _TerminatedError(BaseException):
    """Somebody sent SIGTERM; a BaseException, so that it unwinds like Ctrl-C."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.status = 128 + signal_number


def _ended(command: str, why: str, status: int) -> int:
    process = f"[process {process_rank()}] " if process_count() > 1 else ""
    print(f"cfsp {command}: {process}{why}", file=sys.stderr)
    return status


class _Stop:
    """Handles Ctrl-C and SIGTERM: one that follows another at once asks for the same.

    Who is impatient sends two, and so do SLURM and torchrun together; a second error would cut
    short how the first one cleans up.
    """

    def __init__(self) -> None:
        self._own, self._last = os.getpid(), -math.inf

    def __call__(self, signal_number: int, frame: object) -> None:
        if os.getpid() != self._own:
            # A library forked it: it dies as it would without cfsp.
            signal.signal(signal_number, signal.SIG_DFL)
            os.kill(os.getpid(), signal_number)
        before, self._last = self._last, time.monotonic()
        if self._last - before < _AT_ONCE_SECONDS:
            return
        if signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        raise _TerminatedError(signal_number)

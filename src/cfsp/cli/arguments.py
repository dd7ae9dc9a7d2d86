"""Arguments that several commands share, and what they become."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from cfsp.cli.options import HelpAll, Parser, add_advanced, add_options
from cfsp.errors import UsageError
from cfsp.settings import GOALS, Budget, Compute, Criterion, MaxLossIncrease

Subparsers = Any


def command_parser(
    subparsers: Subparsers,
    run: Callable[[argparse.Namespace], None],
    name: str,
    summary: str,
    example: str,
) -> Parser:
    """Add a subcommand that can print JSON, and whose help ends with an example."""
    parser: Parser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(parser=parser, run=run)
    parser.add_argument("--help-all", nargs=0, action=HelpAll, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def add_model(parser: Parser) -> None:
    """Add the model."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory, hub id (or ID@REVISION), .gguf file, or `demo`",
    )


def add_budget(parser: Parser, *, has_text: bool) -> Any:
    """Add what says how much to remove and by which criterion; return the help's group.

    Args:
        parser: of the command.
        has_text: whether the command has calibration text, of which some can be held out.
    """
    group = parser.add_argument_group("what to remove (one of these, of what --parts names)")
    for settings in (Budget, *GOALS, Criterion):
        if has_text or settings is not MaxLossIncrease:
            add_options(parser, group, settings)
    return group


def add_compute(parser: Parser) -> None:
    """Add where to compute and in what."""
    add_options(parser, parser, Compute, fields=("device", "dtype", "batch_windows"))


def add_process_timeout(parser: Parser) -> None:
    """Add how long processes that torchrun started wait for each other."""
    add_advanced(
        parser,
        "--process-timeout",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="under torchrun: how long the fastest process waits for the slowest (default: 30)",
    )


def process_timeout(args: argparse.Namespace) -> float:
    """Return how long processes wait for each other, in seconds.

    Raises:
        UsageError: it is not positive.
    """
    if not 0 < args.process_timeout < 1e6:
        raise UsageError(f"--process-timeout must be positive, found {args.process_timeout}")
    return 60 * float(args.process_timeout)


def check_texts(data: Sequence[str] | None, evaluation: Sequence[str] | None = None) -> None:
    """Open every text, before anything that is slow: imports, downloads, conversions.

    Args:
        data: what is calibrated on or trained on.
        evaluation: what is measured on.

    Raises:
        TextError: one is missing or not readable.
    """
    from cfsp.text import sources

    sources.check_texts(data or (), "calibration")
    sources.check_texts(evaluation or (), "evaluation")


def typed_command(args: argparse.Namespace) -> str:
    """Return the command line as the user could type it again."""
    return shlex.join(["cfsp", *args.argv])

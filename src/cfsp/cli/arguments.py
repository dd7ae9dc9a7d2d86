"""Arguments that several commands share, and what they become."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from cfsp.cli.options import Parser, add_advanced, add_options, command_parser, settings_from
from cfsp.errors import UsageError
from cfsp.settings import (
    BOS,
    Budget,
    CalibrationText,
    Compute,
    Criterion,
)

__all__ = ["command_parser"]

Subparsers = Any


def add_model(parser: Parser) -> None:
    """Add the model and its revision."""
    parser.add_argument(
        "model", metavar="MODEL", help="directory, hub id, .gguf file, or `demo` (SmolLM2-135M)"
    )
    add_advanced(parser, "--revision", help="branch, tag or commit of a hub id; as MODEL@REVISION")


def add_calibration_text(parser: Parser) -> None:
    """Add the options of the calibration text."""
    add_options(parser, parser.add_argument_group("text"), CalibrationText)


def add_compute(parser: Parser) -> None:
    """Add where to compute and in what."""
    fields = ("device", "dtype", "batch_windows")
    add_options(parser, parser.add_argument_group("computing"), Compute, fields=fields)


def add_memory_budget(parser: Parser) -> None:
    """Add the option that bounds the hidden states of a calibration in memory."""
    add_options(parser, parser, Compute, fields=("memory_budget",))


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


def add_json(parser: Parser) -> None:
    """Add --json."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output"
    )


def add_bos(group: Any) -> None:
    """Add --bos."""
    group.add_argument(
        "--bos", default="auto", choices=BOS, help="as `cfsp prune --help-all` says (default: auto)"
    )


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


def compute(args: argparse.Namespace) -> Compute:
    """Return where to compute and in what."""
    return settings_from(args, Compute)


def budget(args: argparse.Namespace) -> Budget:
    """Return how much to remove; without a sparsity only the multiple counts."""
    return settings_from(args, Budget)


def criterion(args: argparse.Namespace) -> Criterion:
    """Return what counts as important."""
    return settings_from(args, Criterion)


def typed_command(args: argparse.Namespace) -> str:
    """Return the command line as the user could type it again."""
    return shlex.join(["cfsp", *args.argv])

"""Arguments that several commands share, and what they become."""

from __future__ import annotations

import argparse
import shlex

from cfsp.cli.options import Parser, add_options
from cfsp.settings import Compute


def add_model(parser: Parser) -> None:
    """Add the model."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory, hub id (or ID@REVISION), .gguf file, or `demo`",
    )


def names(text: str) -> tuple[str, ...]:
    """Return what a text like `piqa,arc_easy` names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_compute(parser: Parser) -> None:
    """Add where to compute and in what."""
    add_options(parser, parser, Compute, fields=("device", "dtype", "batch_windows"))


def typed_command(args: argparse.Namespace) -> str:
    """Return the command line as the user could type it again."""
    return shlex.join(["cfsp", *args.argv])

"""Arguments that several commands share, and what they become."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from typing import Any

from cfsp.cli.options import Parser, add_options
from cfsp.settings import GOALS, Budget, Compute, Criterion, MaxLossIncrease


def add_model(parser: Parser) -> None:
    """Add the model."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory, hub id (or ID@REVISION), .gguf file, or `demo`",
    )


def add_budget(parser: Parser, *, has_text: bool) -> Any:
    """Add what says how much to remove and by which criterion; return the help's group.

    A bound on the loss is not among it without a text, of which some can be held out.
    """
    group = parser.add_argument_group("what to remove (one of these, of what --parts names)")
    for settings in (Budget, *GOALS, Criterion):
        if has_text or settings is not MaxLossIncrease:
            add_options(parser, group, settings)
    return group


def names(text: str) -> tuple[str, ...]:
    """Return what a text like `piqa,arc_easy` names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_compute(parser: Parser) -> None:
    """Add where to compute and in what."""
    add_options(parser, parser, Compute, fields=("device", "dtype", "batch_windows"))


def check_texts(data: Sequence[str] | None, evaluation: Sequence[str] | None = None) -> None:
    """Open every text, before anything that is slow: imports, downloads, conversions.

    Texts are read to calibrate or train on, or for an evaluation.
    """
    from cfsp.text import sources

    sources.check_texts(data or (), "calibration")
    sources.check_texts(evaluation or (), "evaluation")


def typed_command(args: argparse.Namespace) -> str:
    """Return the command line as the user could type it again."""
    return shlex.join(["cfsp", *args.argv])

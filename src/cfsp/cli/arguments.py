"""Arguments that several commands share, and what they become."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from cfsp.errors import UsageError
from cfsp.planning.allocation import CLAMPS

if TYPE_CHECKING:
    from cfsp.planning.allocation import Budget
    from cfsp.planning.make import Criterion
    from cfsp.settings import CalibrationText, Compute, EvaluationText

# Spelled out here, because their home imports torch; a test compares.
BLOCK_METRICS = ("angular", "cosine", "euclidean", "mse", "mae", "uniform", "global")
SENSITIVITY_METRICS = ("sensitivity", "angular+sensitivity")
CHANNEL_METRICS = ("relative", "eq8", "activation", "wanda", "flap", "magnitude", "random")
RESTORE_METHODS = ("ridge", "sequential", "local", "bias", "none")

Subparsers = Any


class Parser(argparse.ArgumentParser):
    """Refuses arguments with one sentence, not with a page about all there are."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and where to look, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}; see: {self.prog} --help\n")


def command_parser(
    subparsers: Subparsers, name: str, summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a subcommand whose help ends with an example."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the model and its revision."""
    parser.add_argument(
        "model", metavar="MODEL", help="directory, hub id, .gguf file, or `demo` (SmolLM2-135M)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")


def add_calibration_text(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the calibration text."""
    group = parser.add_argument_group("calibration text")
    group.add_argument(
        "--data",
        action="append",
        metavar="TEXT",
        help="wikitext2, c4, NAME:CONFIG:SPLIT:COLUMN on the hub, a .txt, .jsonl or .parquet file, "
        "a saved dataset, python-docs, python-source, or self (text that the model writes, which "
        "takes the whole model in memory); repeat it to draw evenly from several "
        "texts (default: python-docs)",
    )
    group.add_argument(
        "--samples", type=int, metavar="N", help="windows in all (default: 128, or all there are)"
    )
    group.add_argument(
        "--seqlen", type=int, default=1024, metavar="T", help="tokens in a window (default: 1024)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the draw of windows (default: 0)")


def add_compute(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where to compute and in what."""
    group = parser.add_argument_group("computing")
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, ... (default: an accelerator if any)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="what to compute in (default: the model's own)",
    )
    group.add_argument("--batch-windows", type=int, metavar="N", help="windows that pass together")


def add_memory_budget(parser: argparse.ArgumentParser) -> None:
    """Add the argument that bounds the hidden states of a calibration in memory."""
    parser.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="hidden states above this size (2GB, 512MiB) go to a file beside the output "
        "(default: half of the available memory)",
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how much to remove and by which criterion."""
    group = parser.add_argument_group("what to remove")
    group.add_argument("--sparsity", type=float, metavar="P", help="fraction, in [0, 1)")
    group.add_argument(
        "--of",
        default="ffn",
        choices=("ffn", "model"),
        help="fraction of the FFN channels (default) or of all parameters",
    )
    group.add_argument(
        "--multiple",
        type=int,
        metavar="N",
        help="widths become multiples of N (default: 256; 128 below 8192 channels; 64 below "
        "4096; 32 below 1024)",
    )
    group.add_argument(
        "--block-metric",
        default="angular",
        choices=(*BLOCK_METRICS, *SENSITIVITY_METRICS),
        help="what makes a block important: a distance (default: angular); global: the channels "
        "of all blocks compete, by scores that are standardised in each block; sensitivity, "
        "angular+sensitivity: what pruning the block alone does to the predictions, which takes "
        "the whole model in memory",
    )
    group.add_argument(
        "--clamp",
        choices=CLAMPS,
        help="a block that would keep more than all: keep it whole and give the rest to the "
        "others (water-fill, the default by sensitivity), or shrink all importances as the "
        "published code does (the default otherwise)",
    )
    group.add_argument(
        "--channel-metric",
        default="relative",
        choices=CHANNEL_METRICS,
        help="score that makes a channel important (default: relative)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on standard output"
    )


def calibration_text(args: argparse.Namespace) -> CalibrationText:
    """Return the calibration text that was asked for; say so if it is the offline default."""
    from cfsp.settings import CalibrationText

    if not args.data:
        print(
            "calibrating on python-docs, the text that needs no download; a text like the "
            "model's later use does better (--data)",
            file=sys.stderr,
        )
    names = tuple(args.data or ("python-docs",))
    return CalibrationText(names, args.samples, args.seqlen, args.seed)


def compute(args: argparse.Namespace) -> Compute:
    """Return where to compute and in what."""
    from cfsp.engine.memory import parse_size
    from cfsp.settings import Compute

    if args.batch_windows is not None and args.batch_windows < 1:
        raise UsageError(f"--batch-windows must be at least 1, found {args.batch_windows}")
    size = getattr(args, "memory_budget", None)  # only of commands that calibrate
    budget = None if size is None else parse_size(size)
    return Compute(args.device, args.dtype, args.batch_windows, budget)


def budget(args: argparse.Namespace) -> Budget:
    """Return how much to remove; without a sparsity only the multiple counts."""
    from cfsp.planning.allocation import Budget

    return Budget(args.sparsity or 0.0, args.of, args.multiple)


def criterion(args: argparse.Namespace) -> Criterion:
    """Return what counts as important."""
    from cfsp.planning.make import Criterion

    return Criterion(args.block_metric, args.channel_metric, args.clamp)


def evaluation_text(
    names: list[str] | None, windows: int | None, seqlen: int, stride: int | None = None
) -> EvaluationText:
    """Return which texts to measure perplexity on."""
    from cfsp.settings import EvaluationText

    return EvaluationText(tuple(names or ()), windows, seqlen, stride)


def typed_command() -> str:
    """Return the command line as the user could type it again."""
    return shlex.join(["cfsp", *sys.argv[1:]])

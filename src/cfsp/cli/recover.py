"""Train a pruned checkpoint to win back quality and write it in the same layout.

    cfsp recover smaller --max-minutes 30 --out recovered

After a kill the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.architecture.block_names import counted
from cfsp.cli.options import Parser, add_model, add_options, typed, typed_command
from cfsp.cli.output import Told, human_bytes, human_count, print_facts
from cfsp.processes import is_first_process
from cfsp.recovery.settings import Adaptation, Limit, Training
from cfsp.settings import Compute, EvaluationText, options_of
from cfsp.text.sources import check_texts

if TYPE_CHECKING:
    from cfsp.recovery.trainer import RecoverReport


def add_options_to(parser: Parser) -> None:
    add_model(parser)
    parser.add_argument("--out", required=True, type=Path, help="new directory")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data",
        action="append",
        metavar="TEXT",
        help="to train on: as for prune, or conversations (column `messages`, of which answers "
        "are learnt); repeatable (default: mixed, nine kinds of text that come with cfsp)",
    )
    add_options(parser, text, EvaluationText, fields=("names", "windows"))
    add_options(parser, text, Training, fields=("seqlen",))
    length = parser.add_argument_group("how long").add_mutually_exclusive_group()
    add_options(parser, length, Limit)
    group = parser.add_argument_group("training")
    add_options(parser, group, Adaptation)
    others = [field for field in options_of(Training) if field != "seqlen"]
    add_options(parser, group, Training, fields=others)
    group.add_argument(
        "--teacher",
        metavar="MODEL",
        help="the dense model to distil from, or none for the text alone (default: the one that "
        "was pruned, if it is still where the manifest says and there is memory for both)",
    )
    add_options(parser, group, Compute, fields=("device", "dtype"))


def run(args: argparse.Namespace) -> Told:
    # Importing torch is a part of what the user waits for.
    started = time.monotonic()
    check_texts(args.data, args.eval)

    from cfsp.recovery.recover import recover

    # What else the parser knows is no argument of a recovery.
    own = ("argv", "command", "help_all", "json", "model", "parser", "run", "version")
    asked = {name: value for name, value in typed(args).items() if name not in own}
    report = recover(args.model, command=typed_command(args), started=started, **asked)
    return (vars(report), lambda: print_report(report)) if is_first_process() else None


def print_report(report: RecoverReport) -> None:
    from cfsp.result.facts import perplexity_facts
    from cfsp.result.making import seconds_in_words

    print_facts(perplexity_facts(vars(report)))
    print(
        f"{counted(report.steps, 'steps')} of {report.tokens_in_step:,} tokens, "
        f"{report.tokens_per_second:,.0f} tokens/s; "
        f"{human_count(report.trainable_parameters)} parameters trained; "
        f"kept the weights of step {report.best_step}\n"
        f"{seconds_in_words(report.seconds)}; peak memory "
        f"{human_bytes(report.peak_rss_bytes)}\nwritten to {report.out}"
    )

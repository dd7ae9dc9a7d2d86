"""Prune by several methods at several sparsities, and measure each.

cfsp sweep MODEL --sparsity 0.1 0.3 0.5 --method cfsp blocks --eval wikitext2 --out sweep
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import fields
from pathlib import Path

from cfsp.cli.evaluate import add_answers
from cfsp.cli.options import (
    Parser,
    add_advanced,
    add_compute,
    add_model,
    add_options,
    kind_of,
    settings_from,
    typed,
    typed_command,
)
from cfsp.cli.output import Told
from cfsp.processes import check_is_alone
from cfsp.settings import Budget, CalibrationText, Compute, EvaluationText, fraction, names_in
from cfsp.sweep.settings import METHODS, SweepSettings, method_named
from cfsp.text.sources import check_texts


def add_options_to(parser: Parser) -> None:
    """Add its options; those that `SweepSettings` has are called as there."""
    add_model(parser)
    parser.add_argument(
        "--sparsity",
        required=True,
        nargs="+",
        type=kind_of(fraction),
        metavar="P",
        help="fractions, such as 0.2 or 20%%",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        dest="methods",
        type=kind_of(method_named),
        metavar="NAME",
        help=f"of {', '.join(METHODS)}, or a part as `cfsp prune --parts` has it, such as blocks "
        "(default: cfsp)",
    )
    parser.add_argument("--out", required=True, type=Path, help="directory; a sweep there goes on")
    add_options(parser, parser, Budget, fields=("multiple",))
    add_options(parser, parser, CalibrationText)
    measured = parser.add_argument_group("measuring")
    add_options(parser, measured, EvaluationText, fields=("names", "windows"))
    add_answers(measured)
    measured.add_argument(
        "--tasks",
        type=kind_of(names_in),
        metavar="A,B,...",
        help="score tasks, as for eval, in pairs with the dense model",
    )
    add_advanced(parser, "--limit", type=int, metavar="N", help="first N documents of each task")
    add_advanced(parser, "--task-data", metavar="DIR", help="local files of tasks, as for eval")
    add_compute(parser)


def run(args: argparse.Namespace) -> Told:
    check_is_alone("cfsp sweep")
    names = {field.name for field in fields(SweepSettings)}
    settings = SweepSettings(**{key: each for key, each in typed(args).items() if key in names})
    check_texts(settings.data, settings.eval)

    from cfsp.sweep.rows import records, tables, write_tables
    from cfsp.sweep.run import run_sweep

    rows = run_sweep(settings, args.out, settings_from(args, Compute), command=typed_command(args))
    written = write_tables(rows, args.out)

    def say() -> None:
        for table in tables(rows):
            print(f"{table.to_text()}\n\n{table.caption}\n")
        print(f"tables: {', '.join(map(str, written))}")
        print(f"charts: cfsp report {shlex.quote(str(args.out))}")

    return {"models": records(rows), "tables": [str(p) for p in written]}, say

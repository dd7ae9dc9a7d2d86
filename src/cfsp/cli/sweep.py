"""Prune by several methods at several sparsities, and measure each.

cfsp sweep MODEL --sparsity 0.1 0.3 0.5 --method cfsp blocks --eval wikitext2 --out sweep
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.cli import arguments
from cfsp.cli.options import Parser, add_advanced, add_options, kind_of, settings_from
from cfsp.cli.output import Told
from cfsp.errors import UsageError
from cfsp.settings import Budget, CalibrationText, Compute, EvaluationText, fraction
from cfsp.sweep.methods import METHODS, method_named

if TYPE_CHECKING:
    from cfsp.sweep.recipe import Recipe


def add_options_to(parser: Parser) -> None:
    """Add its options."""
    others = vars(parser.parse_args([]))
    _add_recipe(parser)
    # None for what was not given: defaults are the recipe's, and beside --recipe nothing is.
    names = [name for name in vars(parser.parse_args([])) if name not in others]
    parser.set_defaults(in_recipe=names, **dict.fromkeys(names))
    parser.add_argument("--out", required=True, type=Path, help="directory; a sweep there goes on")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE",
        help="model, texts, methods and all that is measured, as TOML, as --out has one; a method "
        "is a table there: name, block_metric, channel_metric, repair, multiple, widths, parts",
    )
    arguments.add_compute(parser)


def _add_recipe(parser: Parser) -> None:
    """Add what a recipe decides; each is a field of `Recipe`."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="as for prune; or it is in the recipe"
    )
    parser.add_argument(
        "--sparsity",
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
    add_options(parser, parser, Budget, fields=("multiple",))
    add_options(parser, parser, CalibrationText)
    measured = parser.add_argument_group("measuring")
    add_options(parser, measured, EvaluationText)
    measured.add_argument(
        "--speed", action="store_true", help="time each model against the dense one, in turns"
    )
    measured.add_argument(
        "--agreement",
        action="store_true",
        help="KL to the dense model and top-1 agreement, on the same texts",
    )
    measured.add_argument(
        "--answers", type=int, metavar="N", help="ask N questions, beside the dense model, as eval"
    )
    measured.add_argument(
        "--tasks",
        type=arguments.names,
        metavar="A,B,...",
        help="score tasks, as for eval, in pairs with the dense model",
    )
    add_advanced(parser, "--limit", type=int, metavar="N", help="first N documents of each task")
    add_advanced(parser, "--task-data", metavar="DIR", help="local files of tasks, as for eval")


def run(args: argparse.Namespace) -> Told:
    """Sweep."""
    recipe = _recipe(args)
    arguments.check_texts(recipe.data, recipe.eval)

    from cfsp.sweep.run import run_sweep
    from cfsp.sweep.table import tables, write_tables

    rows = run_sweep(
        recipe,
        args.out,
        settings_from(args, Compute),
        command=arguments.typed_command(args),
    )
    written = write_tables(rows, args.out)

    def say() -> None:
        for table in tables(rows):
            print(f"{table.to_text()}\n\n{table.caption}\n")
        print(f"tables: {', '.join(map(str, written))}")
        print(f"charts: cfsp report {shlex.quote(str(args.out))}")

    return {"models": [asdict(row) for row in rows], "tables": [str(p) for p in written]}, say


def _recipe(args: argparse.Namespace) -> Recipe:
    from cfsp.sweep.recipe import Recipe, read_recipe

    given = {name: getattr(args, name) for name in args.in_recipe}
    given = {name: value for name, value in given.items() if value is not None}
    if args.recipe:
        if given:
            raise UsageError(
                f"{args.recipe} decides {', '.join(given)} as well; change it there, or leave out "
                "--recipe"
            )
        return read_recipe(args.recipe)
    if "model" not in given:
        raise UsageError("expected a model or a --recipe, found neither")
    if "seed" in given:
        given["seed"] = [given["seed"]]
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    return Recipe(**{"sparsity": (), **given})

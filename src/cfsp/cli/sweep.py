"""`cfsp sweep`: many methods and sparsities from one calibration, in one table."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp.cli import arguments
from cfsp.cli.output import print_json, print_table
from cfsp.errors import UsageError

if TYPE_CHECKING:
    from cfsp.sweep.recipe import Recipe

# Spelled out here, because their home imports torch; a test compares.
METHODS = ("cfsp", "cfsp-plain", "cfsp-published", "wanda-sp", "magnitude-sp", "random")


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "sweep",
        "prune by several methods at several sparsities, and measure each",
        "cfsp sweep MODEL --sparsity 0.1 0.2 0.3 0.4 0.5 --method cfsp wanda-sp --data wikitext2 "
        "--data c4 --eval wikitext2 --out sweep",
    )
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="as for prune; or it is in the recipe"
    )
    parser.add_argument("--out", required=True, type=Path, help="directory; a sweep there goes on")
    parser.add_argument(
        "--recipe", type=Path, metavar="FILE", help="all that follows, as TOML; --out has one"
    )
    parser.add_argument(
        "--sparsity", nargs="+", type=float, metavar="P", help="fractions to remove"
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=METHODS,
        metavar="NAME",
        default=["cfsp"],
        help=f"of {', '.join(METHODS)} (default: cfsp)",
    )
    parser.add_argument(
        "--of", default="ffn", choices=("ffn", "model"), help="as for prune (default: ffn)"
    )
    parser.add_argument("--multiple", type=int, metavar="N", help="as for prune")
    arguments.add_calibration_text(parser)
    measured = parser.add_argument_group("measuring")
    measured.add_argument(
        "--eval", action="append", metavar="TEXT", help="perplexity on this text; repeatable"
    )
    measured.add_argument("--eval-windows", type=int, default=12, metavar="N", help="(default: 12)")
    measured.add_argument(
        "--speed", action="store_true", help="time each model against the dense one, in turns"
    )
    parser.add_argument(
        "--keep-weights", action="store_true", help="keep the pruned models, not only their plans"
    )
    arguments.add_compute(parser)
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Sweep."""
    arguments.check_texts(args.data, args.eval)

    from cfsp.sweep.run import run_sweep
    from cfsp.sweep.table import cells, columns, write_tables

    recipe = _recipe(args)
    rows = run_sweep(
        recipe,
        args.out,
        arguments.compute(args),
        keep_weights=args.keep_weights,
        command=arguments.typed_command(),
    )
    written = write_tables(rows, args.out)
    if args.json:
        print_json({"models": [row.to_json() for row in rows], "tables": [str(p) for p in written]})
        return
    print_table(columns(rows), cells(rows))
    print("\nthe last column: texts, by number, on which nothing smaller is as good")
    print(f"tables: {', '.join(map(str, written))}")
    print(f"charts: cfsp report {shlex.quote(str(args.out))}")


def _recipe(args: argparse.Namespace) -> Recipe:
    from cfsp.sweep.recipe import Recipe, read_recipe
    from cfsp.text.sources import name_of

    if args.recipe:
        if args.model or args.sparsity or args.data or args.eval:
            raise UsageError("--recipe says it all: give no model, --sparsity, --data or --eval")
        return read_recipe(args.recipe)
    if not args.model:
        raise UsageError("expected a model or a --recipe, found neither")
    text = arguments.calibration_text(args)
    return Recipe(
        model=args.model,
        sparsity=tuple(args.sparsity or ()),
        methods=tuple(args.method),
        of=args.of,
        multiple=args.multiple,
        data=tuple(map(name_of, text.names)),
        samples=text.samples,
        seqlen=text.seqlen,
        seed=text.seed,
        bos=text.bos,
        eval=tuple(args.eval or ()),
        eval_windows=args.eval_windows,
        speed=args.speed,
    )

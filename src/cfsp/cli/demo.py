"""`cfsp demo`: prune a real trained model on real text, offline, and show what it did."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cfsp.cli import arguments
from cfsp.cli.bench import print_comparison
from cfsp.cli.options import kind_of
from cfsp.cli.output import print_json
from cfsp.cli.plan import print_plan
from cfsp.cli.prune import print_report
from cfsp.settings import fraction


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        run,
        "demo",
        "prune SmolLM2-135M on text of many kinds and show gain and loss",
        "cfsp demo --out pruned-demo --sparsity 0.3",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("pruned-demo"), help="(default: pruned-demo)"
    )
    parser.add_argument(
        "--sparsity", type=kind_of(fraction), default=0.3, metavar="P", help="(default: 0.3)"
    )


def run(args: argparse.Namespace) -> None:
    """Prune, evaluate, time, and print."""
    # Before torch is there: threads that wait by spinning take six times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from cfsp.demo import run_demo

    result = run_demo(args.out, args.sparsity)
    if args.json:
        print_json(
            {**result.report.to_json(), "speed": result.speed.to_json(), "page": str(result.page)}
        )
        return
    print_plan(result.report.plan)
    print()
    print_report(result.report)
    print()
    print_comparison(result.speed)
    print(
        "\nperplexity of mixed is on documents that were not calibrated on; python-docs is a text "
        "of another kind\nthe model card, with the way to load it: "
        f"{args.out / 'README.md'}\nthe report, to open in a browser: {result.page}"
    )

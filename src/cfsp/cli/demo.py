"""Prune SmolLM2-135M on text of many kinds and show gain and loss.

cfsp demo --out pruned-demo --sparsity 0.3
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cfsp.cli.bench import print_comparison
from cfsp.cli.options import Parser, kind_of
from cfsp.cli.output import Told, print_plan
from cfsp.cli.prune import print_report
from cfsp.settings import fraction


def add_options_to(parser: Parser) -> None:
    """Add its options."""
    parser.add_argument(
        "--out", type=Path, default=Path("pruned-demo"), help="(default: pruned-demo)"
    )
    parser.add_argument(
        "--sparsity", type=kind_of(fraction), default=0.3, metavar="P", help="(default: 0.3)"
    )


def run(args: argparse.Namespace) -> Told:
    """Prune, evaluate and time."""
    # Before torch is there: threads that wait by spinning take six times as long on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from cfsp.demo import run_demo

    report, speed, page = run_demo(args.out, args.sparsity)

    def say() -> None:
        print_plan(report.plan)
        print()
        print_report(report)
        print()
        print_comparison(speed)
        print(
            "\nperplexity of mixed is on documents that were not calibrated on; python-docs is a "
            "text of another kind\nthe model card, with the way to load it: "
            f"{args.out / 'README.md'}\nthe report, to open in a browser: {page}"
        )

    return {**report.to_json(), "speed": speed.to_json(), "page": str(page)}, say

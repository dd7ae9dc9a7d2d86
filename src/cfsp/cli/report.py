"""Show one run, several side by side, or a sweep, on a self-contained web page.

cfsp report smaller smallest --out report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cfsp.cli.options import Parser
from cfsp.cli.output import Told


def add_options_to(parser: Parser) -> None:
    """Add its options."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="directory that prune, recover or sweep wrote",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; replaces an older report, but no other file (default: report.html)",
    )
    parser.add_argument(
        "--results",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="add what `cfsp eval --json` or `cfsp bench --json` measured of the runs and of their "
        "original; repeatable",
    )


def run(args: argparse.Namespace) -> Told:
    """Write the page."""
    from cfsp.result.page.page import write_report

    write_report(args.runs, args.out, results=args.results)
    return {"out": str(args.out)}, lambda: print(f"written to {args.out}")

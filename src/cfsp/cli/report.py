"""`cfsp report`: one web page that shows what pruning did."""

from __future__ import annotations

import argparse
from pathlib import Path

from cfsp.cli import arguments
from cfsp.cli.output import print_json


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        run,
        "report",
        "show one run, several side by side, or a sweep, on a self-contained web page",
        "cfsp report smaller smallest --out report.html",
    )
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


def run(args: argparse.Namespace) -> None:
    """Write the report."""
    from cfsp.result.page.page import write_report

    write_report(args.runs, args.out, results=args.results)
    if args.json:
        print_json({"out": str(args.out)})
    else:
        print(f"written to {args.out}")

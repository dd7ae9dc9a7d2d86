"""Show one run, several side by side, or a sweep, on a self-contained web page.

cfsp report smaller smallest results.json --out report.html
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cfsp.cli.options import Parser
from cfsp.cli.output import Told


def add_options_to(parser: Parser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="directory that prune, recover or sweep wrote; beside them files of what `cfsp eval "
        "--out` or `cfsp bench --json` measured of them and of their original",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; replaces an older report, but no other file (default: report.html)",
    )


def run(args: argparse.Namespace) -> Told:
    from cfsp.result.page.page import write_report

    write_report(args.runs, args.out)
    return {"out": str(args.out)}, lambda: print(f"written to {args.out}")

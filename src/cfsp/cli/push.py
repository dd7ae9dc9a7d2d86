"""Upload a checkpoint or an export to the Hugging Face hub, private by default.

cfsp push smaller my-name/llama-3.2-1b-smaller
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cfsp.cli.options import Parser
from cfsp.cli.output import Told


def add_options_to(parser: Parser) -> None:
    """Add its options."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="what cfsp wrote")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME; made if there is none")
    parser.add_argument("--public", action="store_true", help="let everybody see it")


def run(args: argparse.Namespace) -> Told:
    """Upload, and say where it is."""
    from cfsp.result.push import push

    pushed = push(args.directory, args.repository, public=args.public)
    for note in pushed.notes:
        print(f"note: {note}", file=sys.stderr)
    seen_by = "private" if pushed.private else "public"
    return vars(pushed), lambda: print(f"{pushed.url} ({seen_by}), commit {pushed.commit}")

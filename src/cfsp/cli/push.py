"""`cfsp push`: a finished directory on the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cfsp.cli import arguments
from cfsp.cli.output import print_json


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        run,
        "push",
        "upload a checkpoint or an export to the Hugging Face hub, private by default",
        "cfsp push smaller my-name/llama-3.2-1b-smaller",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="what cfsp wrote")
    parser.add_argument("repository", metavar="REPO", help="OWNER/NAME; made if there is none")
    parser.add_argument("--public", action="store_true", help="let everybody see it")


def run(args: argparse.Namespace) -> None:
    """Upload and print where it is."""
    from cfsp.result.push import push

    pushed = push(args.directory, args.repository, public=args.public)
    for note in pushed.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.json:
        print_json(vars(pushed))
        return
    print(f"{pushed.url} ({'private' if pushed.private else 'public'}), commit {pushed.commit}")

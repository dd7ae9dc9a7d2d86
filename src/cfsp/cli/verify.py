"""`cfsp verify`: is a checkpoint what its manifest says?"""

from __future__ import annotations

import argparse

from cfsp.cli import arguments
from cfsp.cli.options import settings_from
from cfsp.cli.output import print_json
from cfsp.errors import CheckpointError
from cfsp.settings import Compute


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        run,
        "verify",
        "check a checkpoint that cfsp wrote against its manifest",
        "cfsp verify smaller",
    )
    arguments.add_model(parser)
    arguments.add_compute(parser)


def run(args: argparse.Namespace) -> None:
    """Verify and print."""
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.result.verify import verify_checkpoint

    source = open_checkpoint(args.model)
    checks = verify_checkpoint(source, settings_from(args, Compute))
    failed = [check for check in checks if check.problem is not None]
    if args.json:
        print_json({"verified": not failed, "checks": [vars(check) for check in checks]})
    else:
        for check in checks:
            print(f"{'ok    ' if check.problem is None else 'FAILED'}  {check.name}")
    if failed:
        raise CheckpointError(
            f"{source.label} is not what cfsp wrote: "
            + "; ".join(f"{check.problem}" for check in failed)
            + "; prune again, or copy the checkpoint again"
        )

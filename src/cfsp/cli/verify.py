"""Check a checkpoint that cfsp wrote against its manifest.

cfsp verify smaller
"""

from __future__ import annotations

import argparse

from cfsp.cli.options import Parser, add_compute, add_model, settings_from
from cfsp.cli.output import Told, tell
from cfsp.errors import CheckpointError
from cfsp.settings import Compute


def add_options_to(parser: Parser) -> None:
    """Add its options."""
    add_model(parser)
    add_compute(parser)


def run(args: argparse.Namespace) -> Told:
    """Verify."""
    from cfsp.checkpoint.locating import open_checkpoint
    from cfsp.result.verify import verify_checkpoint

    source = open_checkpoint(args.model)
    checks = verify_checkpoint(source, settings_from(args, Compute))
    failed = [check for check in checks if check.problem is not None]

    def say() -> None:
        for check in checks:
            print(f"{'ok    ' if check.problem is None else 'FAILED'}  {check.name}")

    told = {"verified": not failed, "checks": [vars(check) for check in checks]}, say
    if failed:
        tell(told, as_json=args.json)
        raise CheckpointError(
            f"{source.label} is not what cfsp wrote: "
            + "; ".join(f"{check.problem}" for check in failed)
            + "; prune again, or copy the checkpoint again"
        )
    return told

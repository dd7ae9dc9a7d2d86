"""`cfsp families`: which models can be pruned."""

from __future__ import annotations

import argparse

from cfsp.cli import arguments
from cfsp.cli.output import print_json, print_table


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "families",
        "list the model families that can be pruned",
        "cfsp families",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the family table."""
    from cfsp.checkpoint.families import FAMILIES

    families = sorted(FAMILIES.values(), key=lambda family: family.model_type)
    if args.json:
        print_json(
            {
                "families": [
                    {
                        "model_type": family.model_type,
                        "class": family.causal_lm,
                        "ffn": family.ffn_kind,
                        "matrices": [family.path_in_block(name) for name in family.matrices],
                        "blocks": family.blocks,
                        "width_key": family.width_key,
                    }
                    for family in families
                ]
            }
        )
        return
    print_table(
        ("model type", "class", "FFN", "width key"),
        [(f.model_type, f.causal_lm, f.ffn_kind, f.width_key) for f in families],
        left=3,
    )

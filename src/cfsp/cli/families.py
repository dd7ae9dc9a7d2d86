"""`cfsp families`: which models can be pruned."""

from __future__ import annotations

import argparse

from cfsp.cli import arguments
from cfsp.cli.output import print_json, print_table
from cfsp.errors import UsageError, did_you_mean


def add_parser(subparsers: arguments.Subparsers) -> None:
    """Add the subcommand."""
    parser = arguments.command_parser(
        subparsers,
        "families",
        "list the model types of the installed transformers; prove which can be pruned",
        "cfsp families --prove llama qwen3_5",
    )
    parser.add_argument(
        "--prove",
        metavar="TYPE",
        nargs="*",
        help="prove these model types on small random models (without a name: all of them)",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the model types, and with --prove whether each can be pruned."""
    from cfsp.architecture.catalogue import installed_families, why_not

    families = installed_families()
    known = {family.model_type for family in families}
    for name in args.prove or ():
        if name not in known:
            raise UsageError(
                f"the installed transformers has no language model type {name!r}"
                f"{did_you_mean(name, known)}; see: cfsp families"
            )
    if args.prove:
        families = [family for family in families if family.model_type in args.prove]
    is_asked = args.prove is not None
    reasons = {family: why_not(family) if is_asked else None for family in families}
    if args.json:
        rows = [
            {
                "model_type": family.model_type,
                "class": family.class_name,
                "proved": reason is None if is_asked else None,
                "reason": reason,
            }
            for family, reason in reasons.items()
        ]
        print_json({"families": rows})
    elif is_asked:
        print_table(
            ("model type", "class", "proved", "reason"),
            [
                (family.model_type, family.class_name, "no" if reason else "yes", reason or "")
                for family, reason in reasons.items()
            ],
            left=4,
        )
    else:
        print_table(
            ("model type", "class"),
            [(family.model_type, family.class_name) for family in families],
            left=2,
        )

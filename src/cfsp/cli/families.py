"""`cfsp families`: which models can be pruned."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cfsp.cli import arguments
from cfsp.cli.output import print_json, print_table
from cfsp.errors import UsageError, did_you_mean
from cfsp.settings import Part

if TYPE_CHECKING:
    from cfsp.families.catalogue import Family
    from cfsp.families.trial import Reasons

# What is tried besides FFN channels, and what a column of a table of it is called.
COLUMNS: dict[Part, str] = {
    "kv": "KV groups",
    "attention": "attentions",
    "experts": "experts",
    "blocks": "blocks",
}


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
        help="prove on small random models which parts of these model types can go (without a "
        "name: of all)",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the model types, and with --prove what can go of each."""
    from cfsp.families.catalogue import installed_families

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
    if args.prove is None:
        rows = [_row(family, None) for family in families]
    else:
        from cfsp.families.trial import verdicts
        from cfsp.progress import item_progress

        rows = []
        with item_progress("prove", len(families), "type") as bar:
            for family, reasons in zip(families, verdicts(families), strict=True):
                rows.append(_row(family, reasons))
                bar.update()
    if args.json:
        print_json({"families": rows})
    elif args.prove is None:
        print_table(
            ("model type", "class"), [(row["model_type"], row["class"]) for row in rows], left=2
        )
    else:
        print_table(
            ("model type", "class", "proved", *COLUMNS.values(), "reason"),
            [
                (
                    row["model_type"],
                    row["class"],
                    "yes" if row["proved"] else "no",
                    *("yes" if row[part] else "no" for part in COLUMNS),
                    row["reason"] or "",
                )
                for row in rows
            ],
            left=4 + len(COLUMNS),
        )


def _row(family: Family, proof: Reasons | None) -> dict[str, Any]:
    """Return what is known of a family, as JSON types; without a proof parts are None."""
    reasons = proof or dict.fromkeys(("ffn", *COLUMNS))
    return {
        "model_type": family.model_type,
        "class": family.class_name,
        "proved": reasons["ffn"] is None if proof else None,
        "reason": reasons["ffn"],
        **{part: reasons[part] is None if proof else None for part in COLUMNS},
        **{f"{part}_reason": reasons[part] for part in COLUMNS},
    }

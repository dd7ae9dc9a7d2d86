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
    from cfsp.families.trial import Verdict

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
        help="prove on small random models which parts of these model types can go, and check that "
        "the pruned checkpoint of a tiny one works in transformers (without a name: all of them)",
    )
    arguments.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the model types, and with --prove what proof and contract say of each."""
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
            for family, verdict in zip(families, verdicts(families), strict=True):
                rows.append(_row(family, verdict))
                bar.update()
    if args.json:
        print_json({"families": rows})
    elif args.prove is None:
        print_table(
            ("model type", "class"), [(row["model_type"], row["class"]) for row in rows], left=2
        )
    else:
        print_table(
            ("model type", "class", "proved", "contract", *COLUMNS.values(), "reason"),
            [
                (
                    row["model_type"],
                    row["class"],
                    "yes" if row["proved"] else "no",
                    row["contract"] or "",
                    *("yes" if row[part] else "no" for part in COLUMNS),
                    row["reason"] or _in_one_line(row["contract_notes"]),
                )
                for row in rows
            ],
            left=5 + len(COLUMNS),
        )


def _row(family: Family, verdict: Verdict | None) -> dict[str, Any]:
    """Return what is known of a family, as JSON types; nothing of proof and contract is None."""
    contract = verdict.contract if verdict else None
    reasons = verdict.reasons if verdict else dict.fromkeys(("ffn", *COLUMNS))
    return {
        "model_type": family.model_type,
        "class": family.class_name,
        "proved": reasons["ffn"] is None if verdict else None,
        "reason": reasons["ffn"],
        "contract": contract.result if contract else None,
        "contract_notes": contract.notes if contract else {},
        **{part: reasons[part] is None if verdict else None for part in COLUMNS},
        **{f"{part}_reason": reasons[part] for part in COLUMNS},
    }


def _in_one_line(notes: dict[str, str]) -> str:
    return "; ".join(f"{check}: {note}" for check, note in notes.items())

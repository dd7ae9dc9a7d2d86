"""List what can go of each model type of the installed transformers; prove it anew.

cfsp families --prove llama qwen3_5
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

from cfsp.cli.options import Parser
from cfsp.cli.output import Told, print_table
from cfsp.errors import UsageError, did_you_mean
from cfsp.families.catalogue import Family, Reasons, installed_families, proved_before, verdicts
from cfsp.progress import item_progress
from cfsp.settings import DEFAULT_PARTS, PART_NOUNS, PARTS

_log = logging.getLogger(__name__)

# What is tried besides FFN channels.
OTHER_PARTS = tuple(part for part in PARTS if part not in DEFAULT_PARTS)

# None where nobody has tried.
_WORDS = {True: "yes", False: "no", None: "?"}


def add_options_to(parser: Parser) -> None:
    parser.add_argument(
        "--prove",
        metavar="TYPE",
        nargs="*",
        help="prove on small random models which parts of these model types can go (without a "
        "name: of all)",
    )


def run(args: argparse.Namespace) -> Told:
    """Print what can go of each model type: as it was proved before, or with --prove now."""
    families = installed_families()
    if args.prove is None:
        import transformers

        version, before = proved_before()
        rows = [_row(family, before.get(family)) for family in families]
        if version != transformers.__version__:
            _log.warning(
                "proved with transformers %s; with the installed %s: cfsp families --prove TYPE",
                version,
                transformers.__version__,
            )
    else:
        known = {family.model_type for family in families}
        for name in args.prove:
            if name not in known:
                raise UsageError(
                    f"the installed transformers has no language model type {name!r}"
                    f"{did_you_mean(name, known)}; see: cfsp families"
                )
        asked = [family for family in families if family.model_type in (args.prove or known)]
        rows = []
        with item_progress("prove", len(asked), "type") as bar:
            for family, reasons in zip(asked, verdicts(asked), strict=True):
                rows.append(_row(family, reasons))
                bar.update()
    head = ("model type", "class", *PART_NOUNS.values(), "why no channels")
    cells = [
        (
            row["model_type"],
            row["class"],
            *(_WORDS[row[part]] for part in ("proved", *OTHER_PARTS)),
            row["reason"] or "",
        )
        for row in rows
    ]
    return {"families": rows}, lambda: print_table(head, cells, left=3 + len(PARTS))


def _row(family: Family, proof: Reasons | None) -> dict[str, Any]:
    """Return what is known of a family, as JSON types; where nobody tried parts are None."""
    reasons = proof or dict.fromkeys(PARTS)
    return {
        "model_type": family.model_type,
        "class": family.class_name,
        "proved": reasons["ffn"] is None if proof else None,
        "reason": reasons["ffn"],
        **{part: reasons[part] is None if proof else None for part in OTHER_PARTS},
        **{f"{part}_reason": reasons[part] for part in OTHER_PARTS},
    }

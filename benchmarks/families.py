"""Write which model types were proved into docs/families.md.

    cfsp families --prove --json > families.json
    python benchmarks/families.py families.json docs/families.md

`make families` does both. The text between the two marks is replaced, nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cfsp.cli.families import COLUMNS

BEGIN, END = "<!-- proved types: begin -->\n", "<!-- proved types: end -->\n"
_LINE = 110
# A dense model is not refused: it has none.
_NO_EXPERTS = "has no routed experts"
_LONGEST_REASON = 160


def proved_types(families: Sequence[Mapping[str, Any]], transformers: str) -> str:
    """Return what was proved, as Markdown.

    Args:
        families: rows of `cfsp families --prove --json`; a type may have a class for text and one
            for images and text.
        transformers: the version that they are of.
    """
    proved = [row for row in families if row["proved"]]
    listed = [row for row in families if row["proved"] or any(row[part] for part in COLUMNS)]
    types = {row["model_type"] for row in proved}
    lines = [
        f"Of transformers {transformers}: {len(proved)} of {len(families)} classes are proved, of "
        f"{len(types)} model types.",
        "",
        "What can go (`--parts`), at least of some blocks; why not stands in the tables below:",
        "",
        *_table(
            ("FFN channels", *COLUMNS.values()),
            [
                (row, "yes" if row["proved"] else "no", *(_cell(row, part) for part in COLUMNS))
                for row in listed
            ],
        ),
        *(line for part in COLUMNS for line in _why_not(part, listed)),
        "FFN channels can't go of",
        "",
        *_table(("why",), [(row, row["reason"] or "") for row in families if not row["proved"]]),
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a table that begins with a family's type and class."""
    return [
        " | ".join(("| model type | class", *head)) + " |",
        (2 + len(head)) * "|---" + "|",
        *(
            f"| {row['model_type']} | `{row['class']}` | {' | '.join(map(_short, cells))} |"
            for row, *cells in rows
        ),
        "",
    ]


def _cell(row: Mapping[str, Any], part: str) -> str:
    """Return whether a part can go; `-` of a model that has none."""
    if row[part]:
        return "yes"
    return "-" if _NO_EXPERTS in row[f"{part}_reason"] else "no"


def _why_not(part: str, families: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return of how many classes a part can go, and of which it can't."""
    rows = [(row, row[f"{part}_reason"]) for row in families if _cell(row, part) == "no"]
    count = sum(row[part] for row in families)
    return [
        f"`--parts {part}`: {COLUMNS[part]} can go of {count} of these classes, and not of",
        "",
        *_table(("why",), rows),
    ]


def _short(reason: str) -> str:
    text = " ".join(reason.split()).replace("|", "/")
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."


def main(results: Path, document: Path) -> None:
    """Replace what lies between the marks of a document."""
    import transformers

    families = json.loads(results.read_text(encoding="utf-8"))["families"]
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = proved_types(families, transformers.__version__)
    document.write_text(f"{before}{BEGIN}\n{new}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

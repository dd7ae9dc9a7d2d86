"""Write which model types were proved into docs/families.md.

    cfsp families --prove --json > families.json
    python benchmarks/families.py families.json docs/families.md

`make families` does both. The text between the two marks is replaced, nothing else.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

BEGIN, END = "<!-- proved types: begin -->\n", "<!-- proved types: end -->\n"
_LINE = 110
_LONGEST_REASON = 160


def proved_types(families: Sequence[Mapping[str, Any]], transformers: str) -> str:
    """Return what was proved, and what came of the contract, as Markdown.

    Args:
        families: rows of `cfsp families --prove --json`; a type may have a class for text and one
            for images and text.
        transformers: the version that they are of.
    """
    proved = [row for row in families if row["proved"]]
    types = sorted({row["model_type"] for row in proved})
    results = Counter(row["contract"] for row in proved)
    lines = [
        f"Of transformers {transformers}: {len(proved)} of {len(families)} classes are proved, of "
        f"{len(types)} model types. The contract passed for {results['passed']} of these classes, "
        f"failed for {results['failed']} and was not run for {results['not run']}, of which no "
        "tiny model runs. Proved:",
        "",
        fill(", ".join(types), _LINE, break_long_words=False, break_on_hyphens=False),
        "",
        f"Of {len({row['model_type'] for row in proved if row['kv']})} of these types KV groups "
        "can go as well (`--parts ffn,kv`), at least in some blocks: of all but",
        "",
        *_table(("why",), [(row, row["kv_reason"] or "") for row in proved if not row["kv"]]),
        "What the contract found of those (where the dense model fails a check as well, it is not "
        "held against the type):",
        "",
        *_table(
            ("contract", "note"),
            [
                (row, row["contract"], f"{check}: {note}")
                for row in proved
                for check, note in row["contract_notes"].items()
            ],
        ),
        "Refused:",
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

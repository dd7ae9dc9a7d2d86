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
from textwrap import fill
from typing import Any

BEGIN, END = "<!-- proved types: begin -->\n", "<!-- proved types: end -->\n"
_LINE = 110
_LONGEST_REASON = 160


def proved_types(families: Sequence[Mapping[str, Any]], transformers: str) -> str:
    """Return what was proved, as Markdown.

    Args:
        families: rows of `cfsp families --prove --json`; a type may have a class for text and one
            for images and text.
        transformers: the version that they are of.
    """
    proved = sorted({row["model_type"] for row in families if row["proved"]})
    refused = [row for row in families if not row["proved"]]
    lines = [
        f"Of transformers {transformers}: {sum(bool(row['proved']) for row in families)} of "
        f"{len(families)} classes are proved, of {len(proved)} model types:",
        "",
        fill(", ".join(proved), _LINE, break_long_words=False, break_on_hyphens=False),
        "",
        "Refused:",
        "",
        "| model type | class | why |",
        "|---|---|---|",
        *(
            f"| {row['model_type']} | `{row['class']}` | {_short(row['reason'] or '')} |"
            for row in refused
        ),
        "",
    ]
    return "\n".join(lines)


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

"""Prove every model type of the installed transformers, for `cfsp families` to print.

    python benchmarks/families.py src/cfsp/families/proved.json

`make families` does it (an hour). A line of the file is a class and why which parts can't go.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from cfsp.families.catalogue import Family, installed_families, verdicts

_LONGEST_REASON = 164


def line_of(family: Family, reasons: Mapping[str, str | None]) -> str:
    """Return what was found of a family, as one line of JSON."""
    why_not = {part: _short(reason) for part, reason in reasons.items() if reason}
    row = {"model_type": family.model_type, "class": family.class_name, "why_not": why_not}
    return json.dumps(row, ensure_ascii=False)


def _short(reason: str) -> str:
    text, end = " ".join(reason.split()), " ..."
    if len(text) <= _LONGEST_REASON:
        return text
    return text[: _LONGEST_REASON - len(end)].rstrip() + end


def main() -> None:
    """Write the file."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="to write")
    path = parser.parse_args().file
    families = installed_families()
    lines = ",\n".join(map(line_of, families, verdicts(families)))
    head = f'{{"transformers": "{transformers.__version__}", "families": [\n'
    path.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")


if __name__ == "__main__":
    main()

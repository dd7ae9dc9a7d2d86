"""The steps of repair that a manifest records, in words.

A step has a name and for each block an entry: how many blocks changed together, the error before
and after, and whether the new weights were kept. Blocks that changed together have one entry, at
the last of them; the others have None, as blocks without an FFN have. Where blocks have several
FFNs there is an entry for each, which names its block and its path in that.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from cfsp.repair.result import entry_name, rejected_blocks

Step = dict[str, Any]

_ERRORS = {"ridge": "relative squared error of the FFN output"}
_ERROR = "relative error of the hidden states after the block"


def repair_steps(manifest: dict[str, Any]) -> list[Step]:
    """Return the steps of a manifest of version 2, in the order in which they were taken."""
    steps: list[Step] = (manifest.get("repair") or {}).get("steps", [])
    return steps


def check_steps(steps: Sequence[Step]) -> None:
    """Check that steps can be told of and drawn: JSON as Python reads it has NaN, too.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, ArithmeticError: they cannot.
    """
    for step in steps:
        for index, entry in enumerate(step["blocks"]):
            if entry is None:
                continue
            where = f"{step['name']}, block {entry_name(entry, index)}"
            # Null is what training leaves whose error is NaN; such weights are rejected.
            after, kept = entry["error_after"], entry["kept"]
            errors = [entry["error_before"], *([after] if kept or after is not None else [])]
            if not all(isfinite(error) and error >= 0 for error in errors):
                raise ValueError(f"{where}: an error is no number from 0")
            if not 1 <= entry["blocks"] <= index + 1:
                raise ValueError(f"{where}: {entry['blocks']} blocks changed together")
            _ = f"{entry.get('strength') or 0:g}, {entry.get('training_steps') or 0:,}"
            _ = [expert["kept"] for expert in entry.get("experts", ())]


def error_name(step: str) -> str:
    """Return what the errors of a step are errors of."""
    return _ERRORS.get(step, _ERROR)


def changed_weights(step: Step) -> bool:
    """Return whether a step's weights were kept in any block."""
    return not step["blocks"] or any(entry and entry["kept"] for entry in step["blocks"])


def steps_in_words(steps: Sequence[Step]) -> str:
    """Return the steps and what each rejected: `ridge (rejected in block 0), sequential`."""
    return ", ".join(_in_words(step) for step in steps) or "none"


def _in_words(step: Step) -> str:
    rejected = rejected_blocks(step)
    if not rejected:
        return str(step["name"])
    if not changed_weights(step):
        return f"{step['name']} (rejected in every block)"
    noun = "block" if len(rejected) == 1 else "blocks"
    return f"{step['name']} (rejected in {noun} {', '.join(rejected)})"

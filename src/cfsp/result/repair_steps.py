"""The steps of repair that a manifest records, in words.

A step has a name and for each block an entry: how many blocks changed together, the error before
and after, and whether the new weights were kept. Blocks that changed together have one entry, at
the last of them; the others have None, as blocks without an FFN have. Where blocks have several
FFNs there is an entry for each, which names its block and its path in that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cfsp.repair.repaired import rejected_blocks

Step = dict[str, Any]

_ERRORS = {"ridge": "relative squared error of the FFN output"}
_ERROR = "relative error of the hidden states after the block"


def repair_steps(manifest: dict[str, Any]) -> list[Step]:
    """Return the steps of a manifest of version 2, in the order in which they were taken."""
    steps: list[Step] = (manifest.get("repair") or {}).get("steps", [])
    return steps


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

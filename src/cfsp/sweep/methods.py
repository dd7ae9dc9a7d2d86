"""Methods: what `cfsp prune` is told, by the names of its options.

    cfsp            what `cfsp prune` does: blocks by sensitivity where the model fits into memory,
                    else by angular distance, channels by relative importance, repaired
    cfsp-plain      blocks by angular distance, without repair
    cfsp-published  what the released code of arXiv 2409.13199 does: its channel score is the
                    activation's norm alone, widths are multiples of 128, nothing is repaired

A part as `cfsp prune --parts` names it, such as `blocks`, is a method too: what `cfsp prune` does
with it. A recipe can name others.
"""

from __future__ import annotations

from typing import Any

from cfsp.errors import UsageError, did_you_mean
from cfsp.settings import ANGULAR, PARTS, parse_parts

# A name, and values of options of `cfsp prune` by theirs.
Method = dict[str, Any]

_PLAIN = {"block_metric": ANGULAR, "repair": "none"}
METHODS: dict[str, Method] = {
    "cfsp": {"name": "cfsp"},
    "cfsp-plain": {"name": "cfsp-plain", **_PLAIN},
    "cfsp-published": {
        "name": "cfsp-published",
        **_PLAIN,
        "channel_metric": "activation",
        "multiple": 128,
    },
}


def method_named(name: str) -> Method:
    """Return the method of a name, or what `cfsp prune` does with a part."""
    if name in METHODS:
        return METHODS[name]
    given = parse_parts(name)
    if not {*given} <= {*PARTS}:
        raise UsageError(
            f"unknown method {name!r}{did_you_mean(name, METHODS)}; known are: "
            f"{', '.join(METHODS)}, and a part as cfsp prune --parts has it, such as blocks"
        )
    parts = tuple(part for part in PARTS if part in given)
    return {"name": ",".join(parts), "parts": parts}

"""Methods: what `cfsp prune` is told, by the names of its options.

All but the last three remove FFN channels only, so at one budget their results have the same size.
A recipe can name others; these have a name of their own:

    cfsp            what `cfsp prune` does: blocks by sensitivity where the model fits into memory,
                    else by angular distance, channels by relative importance, repaired
    cfsp-plain      blocks by angular distance, without repair
    cfsp-published  what the released code of arXiv 2409.13199 does: its channel score is the
                    activation's norm alone, widths are multiples of 128, nothing is repaired
    wanda-sp        the same width everywhere, channels by |weight| x activation
                    (Sun et al., arXiv 2306.11695, as others make it structured)
    magnitude-sp    the same width everywhere, channels by the down projection's column norm
    random          the same width everywhere, channels drawn by chance: what any method must beat
    blocks          whole blocks, together, repaired; the sparsity is the share of block parameters
    blocks-alone    the blocks that alone turn the hidden state least, not repaired (ShortGPT, arXiv
                    2403.03853)
    experts         whole routed experts, by REAP's score; the sparsity is the share of experts

A part as `cfsp prune --parts` names it, such as `kv`, is a method too: what `cfsp prune` does with
it.
"""

from __future__ import annotations

from typing import Any

from cfsp.errors import UsageError, did_you_mean
from cfsp.settings import INFLUENCE, PARTS, UNIFORM, parse_parts

# A name, and values of options of `cfsp prune` by theirs.
Method = dict[str, Any]


def _uniform(name: str, metric: str) -> Method:
    return {"name": name, "block_metric": UNIFORM, "channel_metric": metric, "repair": "none"}


_KNOWN: tuple[Method, ...] = (
    {"name": "cfsp"},
    {"name": "cfsp-plain", "block_metric": "angular", "repair": "none"},
    {
        "name": "cfsp-published",
        "block_metric": "angular",
        "channel_metric": "activation",
        "clamp": "published",
        "repair": "none",
        "multiple": 128,
    },
    _uniform("wanda-sp", "wanda"),
    _uniform("magnitude-sp", "magnitude"),
    _uniform("random", "random"),
    {"name": "blocks", "parts": ("blocks",)},
    {"name": "blocks-alone", "parts": ("blocks",), "removal": INFLUENCE, "repair": "none"},
    {"name": "experts", "parts": ("experts",)},
)
METHODS = {method["name"]: method for method in _KNOWN}


def method_named(name: str) -> Method:
    """Return the method of a name, or what `cfsp prune` does with a part.

    Raises:
        UsageError: there is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    given = parse_parts(name)
    if not {*given} <= {*PARTS}:
        raise UsageError(
            f"unknown method {name!r}{did_you_mean(name, METHODS)}; known are: "
            f"{', '.join(METHODS)}, and a part as cfsp prune --parts has it, such as kv"
        )
    parts = tuple(part for part in PARTS if part in given)
    return {"name": ",".join(parts), "parts": parts}

"""Methods by name: what makes a block and a channel important, whether to repair, and rounding.

All remove FFN channels only, so at one budget their results have the same size.

    cfsp            ours: blocks by angular distance, channels by relative importance, repaired
    cfsp-plain      the same without repair
    cfsp-published  what the released code of arXiv 2409.13199 does: its channel score is the
                    activation's norm alone, widths are multiples of 128, nothing is repaired
    wanda-sp        the same width everywhere, channels by |weight| x activation
                    (Sun et al., arXiv 2306.11695, as others make it structured)
    magnitude-sp    the same width everywhere, channels by the down projection's column norm
    random          the same width everywhere, channels drawn by chance: what any method must beat
"""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.errors import UsageError
from cfsp.settings import Criterion, Repair


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        criterion: what makes a block and a channel important.
        restore: how what is left is repaired.
        multiple: widths become multiples of this; None for what suits the model.
    """

    criterion: Criterion
    restore: Repair
    multiple: int | None = None


METHODS: dict[str, Method] = {
    "cfsp": Method(Criterion("angular", "relative"), "ridge"),
    "cfsp-plain": Method(Criterion("angular", "relative"), "none"),
    "cfsp-published": Method(Criterion("angular", "activation", "published"), "none", 128),
    "wanda-sp": Method(Criterion("uniform", "wanda"), "none"),
    "magnitude-sp": Method(Criterion("uniform", "magnitude"), "none"),
    "random": Method(Criterion("uniform", "random"), "none"),
}


def method(name: str) -> Method:
    """Return a method by its name.

    Raises:
        UsageError: it is unknown.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; known are: {', '.join(METHODS)}")
    return METHODS[name]

"""Methods: what makes a block and a channel important, the repair, and how widths are rounded.

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

Parts as `cfsp prune --parts` names them, such as `ffn,blocks`, are a method too: what `cfsp prune`
does with them. Sizes are equal where the sparsity is of all parameters (`--set of=model`).
"""

from __future__ import annotations

from dataclasses import dataclass

from cfsp.errors import UsageError, did_you_mean
from cfsp.settings import (
    DEFAULT_PARTS,
    DEFAULT_REPAIR,
    INFLUENCE,
    PARTS,
    Clamp,
    Criterion,
    Part,
    Repair,
    parse_parts,
)


@dataclass(frozen=True)
class Method:
    """A way to prune. Without more than a name it is what `cfsp prune` does.

    Attributes:
        name: of its directories and of its line in the table.
        block_metric: as for prune.
        channel_metric: as for prune.
        clamp: as for prune; None for what suits the block metric.
        repair: as for prune.
        multiple: widths become multiples of this; None for what suits the model.
        parts: as for prune.
        remove_blocks: as for prune; None for as many as the sparsity says, or as measures best.
        remove_attentions: likewise.
        remove_experts: as for prune.
        removal: as for prune.
    """

    name: str
    block_metric: str = Criterion.block_metric
    channel_metric: str = Criterion.channel_metric
    clamp: Clamp | None = None
    repair: Repair = DEFAULT_REPAIR
    multiple: int | None = None
    parts: tuple[Part, ...] = DEFAULT_PARTS
    remove_blocks: int | None = None
    remove_attentions: int | None = None
    remove_experts: int | None = None
    removal: str = Criterion.removal


METHODS = {
    method.name: method
    for method in (
        Method("cfsp"),
        Method("cfsp-plain", "angular", repair="none"),
        Method("cfsp-published", "angular", "activation", "published", "none", 128),
        Method("wanda-sp", "uniform", "wanda", repair="none"),
        Method("magnitude-sp", "uniform", "magnitude", repair="none"),
        Method("random", "uniform", "random", repair="none"),
        Method("blocks", parts=("blocks",)),
        Method("blocks-alone", repair="none", parts=("blocks",), removal=INFLUENCE),
        Method("experts", parts=("experts",)),
    )
}


def method_named(name: str) -> Method:
    """Return the method of a name, or what `cfsp prune` does with the parts that it lists.

    Raises:
        UsageError: there is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    given = parse_parts(name)
    if not {*given} <= {*PARTS}:
        raise UsageError(
            f"unknown method {name!r}{did_you_mean(name, METHODS)}; known are: "
            f"{', '.join(METHODS)}, and parts as cfsp prune --parts has them, such as ffn,blocks"
        )
    parts = tuple(part for part in PARTS if part in given)
    return Method(",".join(parts), parts=parts)

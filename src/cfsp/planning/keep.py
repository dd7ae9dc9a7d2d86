"""What `--keep` names: blocks that stay whole, and modules that lose nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from cfsp.errors import UsageError

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource


@dataclass(frozen=True)
class Kept:
    """What stays as it is.

    Attributes:
        units: indices of the units that keep all their channels.
        blocks: indices of the blocks that are not dropped: something of them stays.
        attentions: of the blocks whose attention is not dropped.
    """

    units: frozenset[int] = frozenset()
    blocks: frozenset[int] = frozenset()
    attentions: frozenset[int] = frozenset()


def kept_by(source: WeightSource, keep: Sequence[str]) -> Kept:
    """Return what stays: numbers are of blocks, other words patterns of modules' names.

    Args:
        source: the model.
        keep: such as `0`, `29`, `model.layers.*.self_attn`.

    Raises:
        UsageError: there is no such block, or no such module that could lose something.
    """
    if not keep:
        return Kept()
    count, prefix = source.architecture.block_count, source.architecture.blocks
    names = [f"{prefix}.{unit.block}.{unit.path}" for unit in source.units]
    blocks: set[int] = set()
    units: set[int] = set()
    for word in keep:
        if word.isdecimal():
            if int(word) >= count:
                raise UsageError(
                    f"--keep names block {word}, and {source.label} has the blocks 0 to {count - 1}"
                )
            blocks.add(int(word))
            continue
        found = {index for index, name in enumerate(names) if fnmatchcase(name, word)}
        if not found:
            raise UsageError(
                f"--keep {word} fits no module that could lose something; such are {names[0]} to "
                f"{names[-1]}"
            )
        units |= found
    units |= {index for index, unit in enumerate(source.units) if unit.block in blocks}
    kept = [source.units[index] for index in units]
    attentions = {unit.block for unit in kept if unit.part == "kv"}
    some_of = {unit.block for unit in kept}
    return Kept(frozenset(units), frozenset(blocks | some_of), frozenset(blocks | attentions))

"""Which block a tensor belongs to, what it is called when others are gone, and what each owns."""

from __future__ import annotations

import re
from collections.abc import Collection

from cfsp.architecture.block_names import index_without
from cfsp.architecture.found import Architecture
from cfsp.checkpoint.reading import WeightSource
from cfsp.errors import UnsupportedModelError


def names_without_blocks(source: WeightSource, removed: Collection[int]) -> dict[str, str]:
    """Return the new names of the stored tensors that stay when some blocks go.

    The number of a tensor's block is the first in its name that is the block's. Tensors that no
    parameter takes stay as they are, but for those numbered behind the last block, as many types
    store multi-token prediction: the config says from which number on.
    """
    if not removed:
        return {name: name for name in source.specs}
    stored, architecture = source.stored, source.architecture
    for name, to in source.tied.items():
        block, other = (architecture.block_of(parameter) for parameter in (name, to))
        if block not in removed and other is not None and other in removed:
            raise UnsupportedModelError(
                f"block {other} of {source.label} can't be removed: {name} has its values from it; "
                "remove others, or FFN channels (--parts ffn)"
            )
    in_model = {name: each for each in stored.parameters for name in stored.sources(each)}
    names: dict[str, str] = {}
    for name in source.specs:
        block = architecture.block_of(in_model.get(name, name))
        if block is None:
            names[name] = name
        elif block not in removed and block < architecture.block_count:
            number = str(index_without(removed, block))
            names[name], found = re.subn(rf"(?<!\d){block}(?!\d)", number, name, count=1)
            if not found:
                raise UnsupportedModelError(
                    f"{source.label} stores {name} of block {block} under a name without that "
                    "number, so that no block before it can be removed"
                )
    return names


def name_without_blocks(
    architecture: Architecture, removed: Collection[int], name: str
) -> str | None:
    """Return what a parameter is called when some blocks are gone; None if it goes with them."""
    block = architecture.block_of(name)
    if block is None:
        return name
    if block in removed:
        return None
    rest = name.removeprefix(architecture.block_prefix(block))
    return architecture.block_prefix(index_without(removed, block)) + rest


def parameters_of_attentions(source: WeightSource) -> dict[int, int]:
    """Return how many parameters the attention of every block has that can go whole, by block."""
    return {
        unit.block: parameters_within(source, f"{source.architecture.module_name(unit)}.")
        for unit in source.architecture.of_part("kv").units
    }


def parameters_behind_blocks(source: WeightSource) -> int:
    """Return how many parameters are stored behind the last block, which go when any block goes."""
    return sum(source.specs[name].elements for name in source.stored.behind(source.architecture))


def parameters_within(source: WeightSource, prefix: str) -> int:
    """Return how many parameters have names in the model that begin so."""
    return sum(s.elements for name, s in source.parameters.items() if name.startswith(prefix))


def parameters_of_an_expert(source: WeightSource) -> dict[int, int]:
    """Return how many parameters go with one expert, its part of the router included, by block."""
    found = {}
    for unit in source.units:
        if unit.expert_axes:
            prefix = source.architecture.block_prefix(unit.block)
            names = {prefix + path for path in (*unit.axes, *unit.expert_axes)}
            found[unit.block] = sum(source.parameters[n].elements for n in names) // unit.ffns
    return found


def parameters_of_blocks(source: WeightSource) -> list[int]:
    """Return how many parameters every block has."""
    blocks = range(source.architecture.block_count)
    return [parameters_within(source, source.architecture.block_prefix(b)) for b in blocks]

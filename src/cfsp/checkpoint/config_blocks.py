"""The config of a model without some of its blocks.

Lists with an entry for every block lose those of the removed ones, lists of blocks are numbered
anew, and a number that says how many of the first or last blocks are something else counts those
that stay. None of that is taken on trust: the stock model is built from the new config, and every
block that stays must be built as it was. What a config says by a rule that cannot say it any more
(every n-th block) is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cfsp.architecture.block_names import blocks_in_words
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.proof import may_matter
from cfsp.checkpoint.text_config import text_config_of, text_fields_of
from cfsp.errors import UnsupportedModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cfsp.architecture.found import Architecture

# What keys that count or number blocks are called, as opposed to experts, tokens or sections.
_OF_BLOCKS = re.compile(r"layer|block|depth|idx|indices|index")
# Lists of as many numbers as there are blocks that have nothing to do with them.
_NOT_OF_BLOCKS = re.compile(r"token|section|architectures")


def changes_without_blocks(config: PreTrainedConfig, removed: Collection[int]) -> dict[str, Any]:
    """Return what keys of the text config become when blocks go, by name.

    Args:
        config: of the stock model; stays as it is.
        removed: indices of the blocks that go.

    Raises:
        UnsupportedModelError: no config of the class builds the blocks that stay as they are.
    """
    fields = text_config_of(config).to_dict()
    before = _Built.of(_reread(config))
    count = len(before.blocks)
    kept = [block for block in range(count) if block not in removed]
    counts = [
        name
        for name, value in fields.items()
        if type(value) is int and value == count and _OF_BLOCKS.search(name)
    ]
    renumbered = dict(_renumbered(fields, kept, count))
    best: tuple[dict[str, Any], list[str]] | None = None
    reason = ""
    for names in (counts, *([name] for name in counts if len(counts) > 1)):
        changes = {**renumbered, **dict.fromkeys(names, len(kept))}
        try:
            found = _differences(config, changes, before, kept)
        except Exception as error:  # whatever a config or class does with numbers that do not fit
            reason = reason or first_line(error)
            continue
        if best is None or len(found) < len(best[1]):
            best = changes, found
    plain = best
    while best is not None and best[1]:
        better = None
        for name, value in _alternatives(fields, kept, count):
            changes = {**best[0], name: value}
            try:
                found = _differences(config, changes, before, kept)
            except Exception:  # likewise
                continue
            if len(found) < len((better or best)[1]):
                better = changes, found
        if better is None:
            break
        best = better
    if best is None or plain is None:
        raise UnsupportedModelError(
            f"{blocks_in_words(removed)} of {config.model_type} can't be removed: no config builds "
            f"the others ({reason}); remove others, or FFN channels (--parts ffn)"
        )
    if best[1]:
        difference = plain[1][0]
        raise UnsupportedModelError(
            f"{blocks_in_words(removed)} of {config.model_type} can't be removed: {difference}"
            f"{_rule(config, before, difference)}; remove others, or FFN channels (--parts ffn)"
        )
    return {name: value for name, value in best[0].items() if value != fields.get(name)}


def same_changes(
    config: PreTrainedConfig, changes: Mapping[str, Any], kept: Sequence[int], count: int
) -> dict[str, Any]:
    """Return the changes of another config of as many blocks, which may have other widths.

    It is not read again: a config that was made smaller need not be one that its class accepts.

    Args:
        config: that is to be changed in the same way; stays as it is.
        changes: see `changes_without_blocks`.
        kept: indices of the blocks that stay.
        count: how many there are.
    """
    own = dict(_renumbered(text_config_of(config).to_dict(), kept, count))
    return {name: own.get(name, value) for name, value in changes.items()}


def config_without_blocks(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a config with changed keys of its text config; see `changes_without_blocks`."""
    changed = copy.deepcopy(config)
    text_config = text_config_of(changed)
    for name, value in changes.items():
        setattr(text_config, name, value)
    return changed


def stock_without_blocks(
    stock: PreTrainedConfig, architecture: Architecture, removed: Collection[int]
) -> tuple[PreTrainedConfig, Architecture, dict[str, Any]]:
    """Return config and architecture of a model without some blocks, and what keys became.

    Args:
        stock: config of the stock model.
        architecture: of the model.
        removed: indices of the blocks that go; none is allowed.

    Raises:
        UnsupportedModelError: as `changes_without_blocks` does.
    """
    if not removed:
        return stock, architecture, {}
    changes = changes_without_blocks(stock, removed)
    return config_without_blocks(stock, changes), architecture.without_blocks(removed), changes


def fields_without_blocks(
    fields: dict[str, Any], config: PreTrainedConfig, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return config.json with the same changes.

    Args:
        fields: the source's config.json; stays as it is.
        config: the same, as an object.
        changes: see `changes_without_blocks`.
    """
    changed = copy.deepcopy(fields)
    text_fields = text_fields_of(changed, config)
    # What a class calls a key now may stand there under an older name, and both under one.
    names = text_config_of(config).attribute_map
    for key, value in changes.items():
        given = {key, *(old for old, new in names.items() if new == key)} & text_fields.keys()
        text_fields.update(dict.fromkeys(sorted(given) or [key], value))
    return changed


@dataclass(frozen=True)
class _Built:
    """What a config builds.

    Attributes:
        blocks: of every block what may change what it computes, by place.
        others: the shapes of all other tensors, by name.
    """

    blocks: list[dict[str, object]]
    others: dict[str, object]

    @staticmethod
    def of(config: PreTrainedConfig) -> _Built:
        """Build the stock model of a config, without weights."""
        with torch.device("meta"):
            model = model_class_of(config)._from_config(copy.deepcopy(config))
        path = find_architecture(model).blocks
        blocks: Any = model.get_submodule(path)
        return _Built(
            [_facts(block) for block in blocks],
            {
                name: tensor.shape
                for name, tensor in model.state_dict().items()
                if not name.startswith(f"{path}.")
            },
        )


def _facts(block: nn.Module) -> dict[str, object]:
    """Return what a block is built of: types, plain numbers and shapes, by place."""
    found: dict[str, object] = {}
    for path, module in block.named_modules():
        found[f"{path} type"] = type(module).__name__
        for name, value in vars(module).items():
            if may_matter(name, value) or (value is None and not name.startswith("_")):
                found[f"{path}.{name}".removeprefix(".")] = value
    for named in (block.named_parameters(), block.named_buffers()):
        for name, tensor in named:
            found[f"{name} shape"] = list(tensor.shape)
    return found


def _reread(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config as it is read again from what is written of it."""
    read: PreTrainedConfig = type(config).from_dict(config.to_dict())
    return read


def _differences(
    config: PreTrainedConfig,
    changes: Mapping[str, Any],
    before: _Built,
    kept: Sequence[int],
) -> list[str]:
    """Return how the model of a changed config differs from the kept blocks, in words.

    Raises:
        Exception: no model is built from it, or one with another number of blocks.
    """
    changed = _reread(config_without_blocks(config, changes))
    after = _Built.of(changed)
    if len(after.blocks) != len(kept):
        raise ValueError(f"expected {len(kept)} blocks, found {len(after.blocks)}")
    found = []
    written = text_config_of(changed).to_dict()
    for name, value in changes.items():
        if written.get(name) != value:
            found.append(f"the config makes {name} {written.get(name)!r} by itself")
    for name in before.others.keys() | after.others.keys():
        old, new = before.others.get(name), after.others.get(name)
        if old != new:
            found.append(f"{name} has a part for every block")
    for index, block in enumerate(kept):
        old_facts, new_facts = before.blocks[block], after.blocks[index]
        for place in old_facts.keys() | new_facts.keys():
            old, new = old_facts.get(place), new_facts.get(place)
            if old != new:
                found.append(f"block {block} would have {new!r} for {place}, it has {old!r}")
    return sorted(found, key=lambda words: (len(words), words))


def _renumbered(
    fields: Mapping[str, Any], kept: Sequence[int], count: int
) -> Iterator[tuple[str, Any]]:
    """Yield the keys that speak of single blocks, with what they say of those that stay."""
    index_of = {block: index for index, block in enumerate(kept)}
    for name, value in fields.items():
        if _NOT_OF_BLOCKS.search(name):
            continue
        if isinstance(value, list | tuple):
            if len(value) == count and list(value) != list(range(count)):
                yield name, type(value)(value[block] for block in kept)
            elif _OF_BLOCKS.search(name) and _are_blocks(value, count):
                yield name, type(value)(index_of[block] for block in value if block in index_of)
        elif isinstance(value, dict) and value and _OF_BLOCKS.search(name):
            if all(str(key).isdecimal() and int(key) < count for key in value):
                yield (
                    name,
                    {
                        type(key)(index_of[int(key)]): entry
                        for key, entry in value.items()
                        if int(key) in index_of
                    },
                )
        elif isinstance(value, str) and len(value) == count and "pattern" in name:
            yield name, "".join(value[block] for block in kept)


def _are_blocks(value: Sequence[Any], count: int) -> bool:
    """Return whether a list is one of blocks by their indices."""
    if not all(type(entry) is int and 0 <= entry < count for entry in value):
        return False
    return list(value) == sorted(set(value)) and len(value) > 0


def _alternatives(
    fields: Mapping[str, Any], kept: Sequence[int], count: int
) -> Iterator[tuple[str, int]]:
    """Yield numbers that may be of so many first or last blocks, and how many of those stay."""
    for name, value in fields.items():
        if type(value) is int and 0 < value <= count:
            first = sum(block < value for block in kept)
            last = sum(block >= count - value for block in kept)
            for number in {first, last} - {value}:
                yield name, number


def _rule(config: PreTrainedConfig, before: _Built, difference: str) -> str:
    """Return the key that decides what differs, in words; empty if none is found."""
    match = re.match(r"block (\d+) would have .* for (.*), it has", difference)
    if match is None:
        return ""
    block, place = int(match[1]), match[2]
    for name, value in text_config_of(config).to_dict().items():
        if type(value) is not int or not 0 < value <= len(before.blocks):
            continue
        for changed in (value + 1, value - 1):
            try:
                other = _Built.of(_reread(config_without_blocks(config, {name: changed})))
                if other.blocks[block].get(place) != before.blocks[block].get(place):
                    return f", which the config says by a rule ({name}={value})"
            except Exception:  # whatever a config or class does with another number
                continue
    return ""

"""With which values of its keys a stock class builds what is left of a model, found by trying.

What is tried and what is wanted are models without weights: the one must be built of the same as
the other (`facts_of`). Where FFNs or attention layers get narrower, that is the whole model. Where
blocks go, lists with an entry for every block, lists of blocks, and numbers of first or last blocks
change, and every block that stays must be built as it was; a rule (every n-th block) is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cfsp.architecture.block_names import blocks_in_words
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import Architecture, Unit
from cfsp.architecture.model_classes import empty_stock_model, identity_of, with_values
from cfsp.architecture.proof import may_matter, small_run_of
from cfsp.architecture.small_run import check_same, small_skeleton
from cfsp.checkpoint.text_config import text_config_of
from cfsp.errors import UnsupportedModelError, first_line

logger = logging.getLogger(__name__)

# What keys that count or number blocks are called, as opposed to experts, tokens or sections.
_OF_BLOCKS = re.compile(r"layer|block|depth|idx|indices|index")
# Lists of as many numbers as there are blocks that have nothing to do with them.
_NOT_OF_BLOCKS = re.compile(r"token|section|architectures")
# Names of keys that may give a width although their value is none, or a part of one.
_LIKE_A_WIDTH = ("intermediate", "ffn", "inner", "mlp", "expan", "ff_dim", "dim_ff")


def facts_of(module: nn.Module) -> dict[str, object]:
    """Return what a module is built of: types, plain numbers and shapes, by place."""
    found: dict[str, object] = {}
    for path, part in module.named_modules():
        found[f"{path} type"] = type(part).__name__
        for name, value in vars(part).items():
            if may_matter(name, value) or (value is None and not name.startswith("_")):
                found[f"{path}.{name}".removeprefix(".")] = value
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            found[f"{name} shape"] = list(tensor.shape)
    return found


# Widths.


class WidthSearch:
    """The keys of a stock config that give the FFNs of an architecture's units their width.

    A key counts if the model that is built with another value of it has other widths, in
    proportion, and computes the same when it is cut back: a class may also scale an output by the
    number.
    """

    def __init__(self, stock: PreTrainedConfig, architecture: Architecture) -> None:
        self.stock = stock
        self._architecture = architecture
        self._widths = _widths_by_path(empty_stock_model(stock), architecture)
        places = [(unit.block, unit.path) for unit in architecture.units]
        asked = *identity_of(stock), str(places)
        if asked not in _found:
            _found[asked] = {
                key: times
                for key, times in _keys_by_trying(stock, architecture, self._widths)
                if _says_widths_only(stock, key, times)
            }
        # By their names: path -> the width of the FFNs there, as a multiple of the value.
        self.keys: Mapping[str, dict[str, int]] = _found[asked]

    def stock_values(self, widths: Sequence[int]) -> dict[str, int] | None:
        """Return the values of keys by which the stock class builds widths; None if it can't."""
        wanted: dict[str, set[int]] = {}
        for unit, width in zip(self._architecture.units, widths, strict=True):
            wanted.setdefault(unit.path, set()).add(width)
        values: dict[str, int] = {}
        for key, times in self.keys.items():
            if any(wanted[path] != self._widths[path] for path in times):
                # A key that changes must suit every path that it is for.
                found = {divmod(width, n) for path, n in times.items() for width in wanted[path]}
                value, rest = found.pop()
                if found or rest:
                    return None
                values[key] = value
        resized = list(zip(self._architecture.units, widths, strict=True))
        return values if _builds(self.stock, values, self._architecture, resized) else None

    def wrong_value(self, widths: Sequence[int]) -> dict[str, int]:
        """Return a key with a value by which the stock class builds none of the widths, if any."""
        for key, times in self.keys.items():
            value = 2 * max(widths) // min(times.values())
            if self.is_width_alone(key, value):
                return {key: value}
        return {}

    def is_width_alone(self, key: str, value: int) -> bool:
        """Return whether a value of a key changes nothing but the widths of units."""
        times = self.keys[key]
        units = (unit for unit in self._architecture.units if unit.path in times)
        resized = [(unit, value * times[unit.path]) for unit in units]
        return _builds(self.stock, {key: value}, self._architecture, resized)


_found: dict[Any, dict[str, dict[str, int]]] = {}  # one command asks several times


def stock_heads(
    stock: PreTrainedConfig, architecture: Architecture, widths: Sequence[int]
) -> dict[str, int] | None:
    """Return the numbers of heads by which the stock class builds such groups; None if it can't."""
    resized = list(zip(architecture.units, widths, strict=True))
    if _builds(stock, {}, architecture, resized):
        return {}
    text_config, unit = text_config_of(stock), architecture.units[0]
    heads = getattr(text_config, "num_attention_heads", None)
    groups = getattr(text_config, "num_key_value_heads", None) or heads
    if len(set(widths)) != 1 or type(heads) is not int or type(groups) is not int or heads % groups:
        return None
    size = unit.axes[unit.down].entries * groups // heads
    values = {"num_attention_heads": heads // groups * widths[0], "head_dim": size}
    if getattr(text_config, "num_key_value_heads", None) is not None:
        values["num_key_value_heads"] = widths[0]
    if not _builds(stock, values, architecture, resized):
        return None
    return {text_config.attribute_map.get(name, name): value for name, value in values.items()}


def _builds(
    stock: PreTrainedConfig,
    values: Mapping[str, int],
    architecture: Architecture,
    resized: Sequence[tuple[Unit, int]],
) -> bool:
    """Return whether other values make the stock class build its model with such units."""
    wanted = empty_stock_model(stock)
    blocks: Any = wanted.get_submodule(architecture.blocks)
    for unit, width in resized:
        unit.resize(blocks[unit.block], width)
    try:
        config = with_values(stock, values)
        # Numbers that are set are not checked, and those that are read are.
        type(config).from_dict(config.to_dict())
        built = empty_stock_model(config)
    except Exception:  # whatever a config or class does with numbers that it does not expect
        return False
    # An FFN much narrower than the hidden size may not be recognised any more.
    found = {(unit.block, unit.path) for unit in find_architecture(built).units}
    ffns = [unit for unit, _ in resized if unit.part == "ffn"]
    both = [facts_of(built), facts_of(wanted)]
    if len(ffns) == len(resized):
        # A block may keep a width that its FFN does not compute with, as that of Jamba's experts.
        both = [{k: fact for k, fact in f.items() if k.endswith(" shape")} for f in both]
    return all((unit.block, unit.path) in found for unit in ffns) and both[0] == both[1]


def _keys_by_trying(
    config: PreTrainedConfig, architecture: Architecture, before: Mapping[str, set[int]]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the keys that give FFNs their width, whatever else they may say."""
    known = set().union(*before.values())
    for name, old in text_config_of(config).to_dict().items():
        like = any(word in name for word in _LIKE_A_WIDTH)
        if old is None and like:
            value = min(known) // 2
        elif type(old) is int and old > 1 and (old in known or like):
            value = old // 2
        else:
            continue
        try:
            model = empty_stock_model(with_values(config, {name: value}))
            after = _widths_by_path(model, architecture)
        except Exception:  # whatever a config or class does with a number that it does not expect
            continue
        affected = {path: widths for path, widths in after.items() if widths != before[path]}
        if affected and all(len(w) == 1 and min(w) % value == 0 for w in affected.values()):
            yield name, {path: min(widths) // value for path, widths in affected.items()}


@torch.no_grad()
def _says_widths_only(config: PreTrainedConfig, key: str, times: Mapping[str, int]) -> bool:
    """Return whether a small model, built with twice the value and cut back, computes the same."""
    run = small_run_of(config)
    architecture, model = run.architecture, run.model
    units = [unit for unit in architecture.units if unit.path in times]
    value = 2 * units[0].width // times[units[0].path]
    try:
        built = small_skeleton(with_values(model.config, {key: value}))
        for unit in units:
            unit.resize(built.get_submodule(architecture.blocks)[unit.block], unit.width)
        decoder, same = (each.get_submodule(architecture.decoder) for each in (built, model))
        decoder.load_state_dict(same.state_dict(), assign=True)
        cut = replace(run, model=built)
        check_same("cut", "the same output", cut.decoder_output, run.decoder_output())
    except Exception:  # whatever a class does with a number that it does not expect
        return False
    return True


def _widths_by_path(model: PreTrainedModel, architecture: Architecture) -> dict[str, set[int]]:
    """Return the widths that a model has at the paths of an architecture's units."""
    found: dict[str, set[int]] = {}
    for unit in architecture.units:
        down = model.get_parameter(architecture.block_prefix(unit.block) + unit.down)
        found.setdefault(unit.path, set()).add(unit.axes[unit.down].width(down.shape))
    return found


# Blocks.


def changes_without_blocks(config: PreTrainedConfig, removed: Collection[int]) -> dict[str, Any]:
    """Return what keys of a stock config's text config become when blocks go; refuse what can't."""
    fields = text_config_of(config).to_dict()
    search = _Search(config, removed)
    counts = [
        name
        for name, value in fields.items()
        if type(value) is int and value == search.count and _OF_BLOCKS.search(name)
    ]
    renumbered = dict(_renumbered(fields, search.kept, search.count))
    best = plain = search.best(
        {**renumbered, **dict.fromkeys(names, len(search.kept))}
        for names in (counts, *([name] for name in counts if len(counts) > 1))
    )
    while best is not None and best[1]:
        others = _alternatives(fields, search.kept, search.count)
        better = search.best({**best[0], name: value} for name, value in others)
        if better is None or len(better[1]) >= len(best[1]):
            break
        best = better
    if best is None or plain is None:
        reason = f"no config builds the others ({search.first_failure})"
    elif best[1]:
        reason = plain[1][0]
    else:
        return {name: value for name, value in best[0].items() if value != fields.get(name)}
    raise UnsupportedModelError(
        f"{blocks_in_words(removed)} of {config.model_type} can't be removed: {reason}; remove "
        "others, or FFN channels (--parts ffn)"
    )


def with_same_changes(
    config: PreTrainedConfig, changes: Mapping[str, Any], removed: Collection[int], count: int
) -> PreTrainedConfig:
    """Return another config of as many blocks, which may have other widths, with the changes."""
    # It is not read again: one that was made smaller need not be one that its class accepts.
    kept = [block for block in range(count) if block not in removed]
    own = dict(_renumbered(text_config_of(config).to_dict(), kept, count))
    return with_values(config, {name: own.get(name, value) for name, value in changes.items()})


def warn_of_rhythm(config: PreTrainedConfig, removed: Collection[int], count: int) -> None:
    """Warn where blocks that stay alternate otherwise than the first of the dense model."""
    fields = text_config_of(config).to_dict()
    kept = [block for block in range(count) if block not in removed]
    if broken := [
        key
        for key, value in _renumbered(fields, kept, count)
        if not isinstance(value, dict) and len(fields[key]) == count
        if value != fields[key][: len(kept)]
    ]:
        logger.warning(
            "the blocks that stay no longer alternate as those of the dense model (%s): "
            "transformers reads that in config.json, but llama.cpp (Gemma, Cohere, SmolLM3) and "
            "mlx-lm (Gemma, Cohere) have a rhythm built in: what their own converters make of it "
            "computes something else without a word",
            ", ".join(broken),
        )


def stock_without_blocks(
    stock: PreTrainedConfig, architecture: Architecture, removed: Collection[int]
) -> tuple[PreTrainedConfig, Architecture, dict[str, Any]]:
    """Return config and architecture of a stock model without blocks, and what keys became."""
    if not removed:
        return stock, architecture, {}
    changes = changes_without_blocks(stock, removed)
    return with_values(stock, changes), architecture.without_blocks(removed), changes


class _Search:
    """Looks for a config by which a stock class builds the blocks that stay as they were."""

    def __init__(self, config: PreTrainedConfig, removed: Collection[int]) -> None:
        self._config = config
        _, self._blocks, self._others = _built(config)
        self.count = len(self._blocks)
        self.kept = [block for block in range(self.count) if block not in removed]
        self.first_failure = ""

    def best(self, proposals: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], list[str]] | None:
        """Return the changes with the fewest differences, and these; None if no model is built."""
        found: tuple[dict[str, Any], list[str]] | None = None
        for changes in proposals:
            try:
                differences = self._differences(changes)
            except Exception as error:  # whatever a class does with numbers that do not fit
                self.first_failure = self.first_failure or first_line(error)
                continue
            if found is None or len(differences) < len(found[1]):
                found = changes, differences
        return found

    def _differences(self, changes: Mapping[str, Any]) -> list[str]:
        """Return how the model of a changed config differs from the kept blocks, in words."""
        config, blocks, others = _built(with_values(self._config, changes))
        if len(blocks) != len(self.kept):
            raise ValueError(f"expected {len(self.kept)} blocks, found {len(blocks)}")
        written = text_config_of(config).to_dict()
        found = [
            f"the config makes {name} {repr(written.get(name))[:120]} by itself"
            for name, value in changes.items()
            if written.get(name) != value
        ]
        found += [
            f"{name} has a part for every block"
            for name in self._others.keys() | others.keys()
            if self._others.get(name) != others.get(name)
        ]
        for block, new_facts in zip(self.kept, blocks, strict=True):
            old_facts = self._blocks[block]
            for place in old_facts.keys() | new_facts.keys():
                old, new = old_facts.get(place), new_facts.get(place)
                if old != new:
                    found.append(f"block {block} would have {new!r} for {place}, it has {old!r}")
        return sorted(found, key=lambda words: (len(words), words))


def _built(
    config: PreTrainedConfig,
) -> tuple[PreTrainedConfig, list[dict[str, object]], dict[str, object]]:
    """Return a config read again, `facts_of` every block, and the shapes of all other tensors."""
    reread: PreTrainedConfig = type(config).from_dict(config.to_dict())
    model = empty_stock_model(reread)
    path = find_architecture(model).blocks
    blocks: Any = model.get_submodule(path)
    others: dict[str, object] = {
        name: tensor.shape
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{path}.")
    }
    return reread, [facts_of(block) for block in blocks], others


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
                staying = {key: entry for key, entry in value.items() if int(key) in index_of}
                yield name, {_key(k, index_of[int(k)], kept, count): e for k, e in staying.items()}
        elif isinstance(value, str) and len(value) == count and "pattern" in name:
            yield name, "".join(value[block] for block in kept)


def _key(old: Any, index: int, kept: Sequence[int], count: int) -> Any:
    """Return the key of a block in a table, with zeros in front where all keys are as long."""
    if isinstance(old, str) and len(old) == len(str(count - 1)):
        return str(index).zfill(len(str(len(kept) - 1)))
    return type(old)(index)


def _are_blocks(value: Sequence[Any], count: int) -> bool:
    if not value or not all(type(entry) is int and 0 <= entry < count for entry in value):
        return False
    return list(value) == sorted(set(value))


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

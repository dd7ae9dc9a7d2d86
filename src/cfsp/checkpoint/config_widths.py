"""The one rule for widths in a config: of config.json, and of a config object in memory.

Widths that the stock class can build are said by its own keys (`intermediate_size`). Where each
block has one FFN, others go to `per_layer_config`, the schema that transformers reads from 5.15
on; everything else goes to `ffn_widths`, by block and path. Both need the modelling file.

KV groups that are equally many in all blocks are said by the stock class's numbers of heads, others
go to `kv_groups`, by block and path. The stock numbers are then those of the unpruned model.

What needs the modelling file must not load without it. The stock class fails where FFNs or
attentions have other shapes than it builds, but would give an attention that is gone random
weights. Where nothing else differs, the stock key says another width than the FFNs have.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cfsp.architecture.model_classes import PRUNED, model_class_of
from cfsp.checkpoint.modeling_code import (
    FFN_WIDTHS,
    KV_GROUPS,
    PER_LAYER_CONFIG,
    ModelingFile,
)
from cfsp.checkpoint.text_config import text_fields_of, text_path
from cfsp.checkpoint.width_keys import (
    WidthKey,
    WidthSearch,
    stock_heads,
    units_are_found,
)
from cfsp.errors import CheckpointError, UnsupportedModelError
from cfsp.settings import Part

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cfsp.architecture.found import Architecture, Unit

# In the config of a model that was pruned in memory: what a manifest says of one in files.
PRUNED_KEY = "cfsp"


def stock_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the stock model that the modelling file begins with."""
    stock = copy.deepcopy(config)
    if width_key_of(config) is not None:
        stock.per_layer_config = None
    for key in (FFN_WIDTHS, KV_GROUPS):
        if hasattr(stock, key):
            delattr(stock, key)
    return stock


def resized_parts(config: PreTrainedConfig) -> tuple[Part, ...]:
    """Return the parts to which a config of ours gives widths that the stock class cannot build."""
    has_ffns = width_key_of(config) is not None or getattr(config, FFN_WIDTHS, None) is not None
    groups = getattr(config, KV_GROUPS, None)
    has_gone = any(0 in count_of.values() for count_of in (groups or {}).values())
    has: dict[Part, bool] = {"ffn": has_ffns, "kv": groups is not None, "attention": has_gone}
    return tuple(part for part in has if has[part])


def with_given_widths(architecture: Architecture, config: PreTrainedConfig) -> Architecture:
    """Return the architecture of the stock model with the widths that a config of ours gives it.

    Raises:
        CheckpointError: it speaks of an FFN that is not there, or of an impossible width.
    """
    given = dict(_given_widths(architecture.units, config))
    widths = []
    for unit in architecture.units:
        width = given.pop((unit.block, unit.path), unit.width)
        least = 1 if unit.part == "ffn" else 0
        if type(width) is not int or not least <= width <= unit.width:
            channels = "FFN channels" if unit.part == "ffn" else "KV groups"
            raise CheckpointError(
                f"config.json gives block {unit.block} {width!r} {channels}, expected {least} to "
                f"{unit.width}; download the model again"
            )
        widths.append(width)
    if given:
        block, path = next(iter(given))
        raise CheckpointError(
            f"config.json gives a width for {path!r} of block {block}, which the model does not "
            "have; download the model again"
        )
    return architecture.with_widths(widths)


def width_key_of(config: PreTrainedConfig) -> str | None:
    """Return what `per_layer_config` of a config of ours calls the width; None if it has none.

    A few stock classes have a `per_layer_config` of their own, for attention.
    """
    is_ours = any(name.startswith(PRUNED) for name in config.architectures or ())
    if not is_ours or getattr(config, FFN_WIDTHS, None) is not None:
        return None
    fields: dict[str, dict[str, Any]] = config.to_dict().get(PER_LAYER_CONFIG) or {}
    keys = {key for entry in fields.values() for key in entry}
    return keys.pop() if len(keys) == 1 else None


def modeling_file(config: PreTrainedConfig, architecture: Architecture) -> ModelingFile | None:
    """Return the modelling file that a config needs; None if the stock class can build it."""
    parts = resized_parts(config)
    if not parts:
        return None
    key = width_key_of(config)
    return ModelingFile(architecture, model_class_of(config), type(config), key, parts)


def fields_and_file(
    fields: dict[str, Any],
    config: PreTrainedConfig,
    architecture: Architecture,
    widths: Sequence[int],
) -> tuple[dict[str, Any], ModelingFile | None]:
    """Return config.json of the pruned model, and the modelling file if it needs one.

    Args:
        fields: the source's config.json; stays as it is.
        config: the same, as an object.
        architecture: of the source.
        widths: of every FFN unit.
    """
    changes, file = _changes(config, architecture, widths)
    text_changes = changes.pop(_TEXT)
    if not text_path(config):
        return _changed(fields, {**text_changes, **changes}), file
    changed = copy.deepcopy(_changed(fields, changes))
    text_fields_of(changed, config).update(text_changes)
    return changed, file


def config_with_widths(
    config: PreTrainedConfig, architecture: Architecture, widths: Sequence[int]
) -> PreTrainedConfig:
    """Return the config of the pruned model, of the class that the source's config has.

    Args:
        config: the source's; stays as it is.
        architecture: of the source.
        widths: of every FFN unit.
    """
    changed = copy.deepcopy(config)
    changes, _ = _changes(config, architecture, widths)
    # Last of all: it makes a config for every block out of the whole.
    per_layer = changes.pop(PER_LAYER_CONFIG, None)
    if width_key_of(config) is not None:
        changed.per_layer_config = None
    for key, value in changes.pop(_TEXT).items():
        setattr(changed.get_text_config(decoder=True), key, value)
    for key, value in changes.items():
        if value is not None:
            setattr(changed, key, value)
        elif hasattr(changed, key):
            delattr(changed, key)
    if per_layer is not None:
        changed.per_layer_config = per_layer
    return changed


def check_attentions_can_go_alone(config: PreTrainedConfig, architecture: Architecture) -> None:
    """Check that a model can be written without an attention layer and with all of its channels.

    Args:
        config: the source's.
        architecture: of the source, with its attention layers.

    Raises:
        UnsupportedModelError: it can't, because the stock class would load it.
    """
    layers = [index for index, unit in enumerate(architecture.units) if unit.part == "kv"]
    widths = architecture.widths
    widths[layers[0]] = 0
    _changes(config, architecture, widths)


_TEXT = "text"


def _changes(
    config: PreTrainedConfig, architecture: Architecture, widths: Sequence[int]
) -> tuple[dict[str, Any], ModelingFile | None]:
    """Return what the widths say of each key of a config; None where it must not be there.

    The changes to the text config, which may be the config itself, are under `_TEXT`. Second comes
    the modelling file that the config then needs.
    """
    model_class, stock = model_class_of(config), stock_config(config)
    # That of a stock class stays.
    keeps_none = stock.to_dict().get(PER_LAYER_CONFIG) is None
    # What is gone stays gone.
    architecture = replace(architecture, units=architecture.stock_units, gone=())
    given = iter(widths)
    widths = [next(given) if unit.width else 0 for unit in architecture.units]
    changes: dict[str, Any] = {
        _TEXT: {},
        "architectures": [model_class.__name__],
        **({PER_LAYER_CONFIG: None} if keeps_none else {}),
        FFN_WIDTHS: None,
        KV_GROUPS: None,
        "auto_map": None,
        PRUNED_KEY: None,
    }
    width_of: dict[Part, list[int]] = {"ffn": [], "kv": []}
    for unit, width in zip(architecture.units, widths, strict=True):
        width_of[unit.part].append(width)
    parts: list[Part] = []
    would_load = False
    if width_of["kv"]:
        attentions = architecture.of_part("kv")
        heads = stock_heads(stock, attentions, width_of["kv"])
        if heads is not None:
            changes[_TEXT] |= heads
        else:
            changes[KV_GROUPS] = _by_place(attentions.units, width_of["kv"])
            parts += ["kv", "attention"] if 0 in width_of["kv"] else ["kv"]
            pairs = zip(width_of["kv"], attentions.units, strict=True)
            would_load = all(width in (0, unit.width) for width, unit in pairs)
    ffn_key = None
    if width_of["ffn"]:
        ffns = architecture.of_part("ffn")
        ours, ffn_key = _ffn_changes(config, stock, ffns, width_of["ffn"], would_load)
        changes[_TEXT] |= ours.pop(_TEXT, {})
        changes |= ours
        parts = ["ffn", *parts] if ours else parts
    if would_load and "ffn" not in parts:
        raise UnsupportedModelError(
            f"attention layers of {architecture.class_name} can't go alone: no key of its config "
            "says how wide FFNs are, so the stock class would load it with random ones; remove FFN "
            "channels too (--parts attention,ffn)"
        )
    if not parts:
        return changes, None
    file = ModelingFile(architecture, model_class, type(config), ffn_key, tuple(parts))
    changes["architectures"] = [f"{PRUNED}{model_class.__name__}"]
    changes["auto_map"] = file.auto_map
    return changes, file


def _ffn_changes(
    config: PreTrainedConfig,
    stock: PreTrainedConfig,
    architecture: Architecture,
    widths: Sequence[int],
    would_load: bool,
) -> tuple[dict[str, Any], str | None]:
    """Return what the widths of FFNs say of keys of a config, and the key of `per_layer_config`.

    Keys beside `_TEXT` are ours and need the modelling file. `would_load` says that the stock class
    builds all else, although it must not.
    """
    search = WidthSearch.of(stock, architecture.units)
    stock_values = search.stock_values(architecture, widths)
    would_load = would_load and stock_values is not None
    if stock_values is not None and not would_load:
        return {_TEXT: stock_values}, None
    keeps_none = stock.to_dict().get(PER_LAYER_CONFIG) is None
    key = _per_layer_key(search.keys, architecture, config) if keeps_none else None
    value = max(widths) * (2 if would_load else 1)
    if key is not None and not units_are_found(stock, {key: value}, architecture):
        key = None
    if key is None:
        by_place = {FFN_WIDTHS: _by_place(architecture.units, widths)}
        if not would_load:
            return by_place, None
        wrong = search.wrong_value(architecture, widths)
        return {_TEXT: wrong, **by_place} if wrong else {_TEXT: stock_values}, None
    digits = len(str(len(widths) - 1))
    per_layer = {str(i).zfill(digits): {key: width} for i, width in enumerate(widths)}
    return {_TEXT: {key: value}, PER_LAYER_CONFIG: per_layer}, key


def _by_place(units: Sequence[Unit], widths: Sequence[int]) -> dict[str, dict[str, int]]:
    """Return the widths of units by their block and path."""
    width_of: dict[str, dict[str, int]] = {}
    for unit, width in zip(units, widths, strict=True):
        width_of.setdefault(str(unit.block), {})[unit.path] = width
    return width_of


def _per_layer_key(
    keys: Sequence[WidthKey], architecture: Architecture, config: PreTrainedConfig
) -> str | None:
    """Return the key by which `per_layer_config` can say the widths; None if it cannot."""
    units = architecture.units
    one_each = [unit.block for unit in units] == list(range(architecture.block_count))
    if not one_each or len({unit.path for unit in units}) != 1 or text_path(config):
        return None
    found = [key.name for key in keys if key.times.get(units[0].path) == 1]
    return found[0] if len(found) == 1 else None


def _changed(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    # First without: the order of what stays is that of the source.
    kept = {k: v for k, v in fields.items() if changes.get(k, v) is not None or v is None}
    return kept | {key: value for key, value in changes.items() if value is not None}


def _given_widths(
    units: Sequence[Unit], config: PreTrainedConfig
) -> Iterator[tuple[tuple[int, str], Any]]:
    key = width_key_of(config)
    if key is not None:
        layers = list(config.per_layer_config)
        for unit in units:
            if unit.part == "ffn":
                yield (unit.block, unit.path), getattr(layers[unit.block], key)
    for given in (FFN_WIDTHS, KV_GROUPS):
        for block, width_of in (getattr(config, given, None) or {}).items():
            for path, width in width_of.items():
                yield (int(block), path), width

"""What a config of ours says of widths, and the stock config and modelling file that go with it.

`cfsp.checkpoint.pruned_config` writes what is read here: `per_layer_config` or `ffn_widths` for
FFNs, `kv_groups` for attentions. What needs none of them is a stock config.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cfsp.architecture.model_classes import PRUNED, model_class_of
from cfsp.checkpoint.modeling_code import FFN_WIDTHS, KV_GROUPS, PER_LAYER_CONFIG, ModelingFile
from cfsp.errors import CheckpointError
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
    """Return the architecture of the stock model with the widths that a config of ours gives it."""
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


def width_key_of(config: PreTrainedConfig) -> str | None:
    """Return what `per_layer_config` of a config of ours calls the width; None if it has none."""
    # A few stock classes have a `per_layer_config` of their own, for attention.
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

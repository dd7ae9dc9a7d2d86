"""What a config builds: the stock model, or ours with widths of its own; models without weights.

`cfsp.checkpoint.pruned_config` writes what is read here: `per_layer_config` or `ffn_widths` for
FFNs, `kv_groups` for attention layers. What needs none of them is a stock config. Single tensors
are put into the models when they are needed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from operator import attrgetter
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import PRUNED, build_model, empty_stock_model, model_class_of
from cfsp.architecture.proof import prove
from cfsp.checkpoint.modeling_code import (
    FFN_WIDTHS,
    KV_GROUPS,
    PER_LAYER_CONFIG,
    ModelingFile,
    pruned_class,
)
from cfsp.errors import CheckpointError
from cfsp.settings import DEFAULT_PARTS, LEAST_WIDTH, PART_NOUNS, PROVED_PARTS, Part

logger = logging.getLogger(__name__)

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
    has_ffns = width_key_of(config) is not None or bool(getattr(config, FFN_WIDTHS, None))
    groups = getattr(config, KV_GROUPS, None)
    has_gone = any(0 in count_of.values() for count_of in (groups or {}).values())
    has: dict[Part, bool] = {"ffn": has_ffns, "kv": groups is not None, "attention": has_gone}
    return tuple(part for part in has if has[part])


def architecture_of(
    config: PreTrainedConfig, parts: tuple[Part, ...] = DEFAULT_PARTS
) -> Architecture:
    """Return the blocks and proved units of a config's model, with the widths it gives them.

    The units are those of `parts`, and those to which the config gives widths of their own.
    """
    stock = stock_config(config)
    # Proving takes a part of a second, and one command asks several times.
    wanted = (*parts, *resized_parts(config))
    parts = tuple(part for part in PROVED_PARTS if part in wanted)
    fields = stock.to_dict()
    for name in ("architectures", "auto_map", "_name_or_path"):  # where it is from, and pruned how
        fields.pop(name, None)
    # By the classes themselves: who works on one in a notebook defines it again by the same name.
    key = model_class_of(stock), type(config), parts, str(fields)
    if key not in _proved:
        _proved[key] = prove(stock, parts=parts)
    architecture = _proved[key]
    given = dict(_given_widths(architecture, config))
    widths = []
    for unit in architecture.units:
        width = given.pop((unit.block, unit.path), unit.width)
        least = LEAST_WIDTH[unit.part]
        if type(width) is not int or not least <= width <= unit.width:
            raise CheckpointError(
                f"config.json gives block {unit.block} {width!r} {PART_NOUNS[unit.part]}, expected "
                f"{least} to {unit.width}; download the model again"
            )
        widths.append(width)
    if given:
        block, path = next(iter(given))
        raise CheckpointError(
            f"config.json gives a width for {path!r} of block {block}, which the model does not "
            "have; download the model again"
        )
    return architecture.with_widths(widths)


_proved: dict[Any, Architecture] = {}


def _given_widths(
    architecture: Architecture, config: PreTrainedConfig
) -> Iterator[tuple[tuple[int, str], Any]]:
    """Yield the widths that a config of ours gives, with the block and the path of each."""
    key = width_key_of(config)
    if key is not None:
        layers = list(config.per_layer_config)
        for unit in architecture.of_part("ffn").units:
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


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a config's model: stock, or ours for what stock cannot build."""
    stock, parts = model_class_of(config), resized_parts(config)
    if not parts:
        return stock
    architecture, key = architecture_of(config), width_key_of(config)
    return pruned_class(ModelingFile(architecture, stock, type(config), key, parts))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a config with names and shapes only: everything is on the meta device."""
    return empty_stock_model(config, model_class(config))


def check_is_of_its_config(model: PreTrainedModel) -> None:
    """Check that a model in memory has the weights that its class has by its config."""
    built = empty_model(model.config)
    found, expected = model.state_dict(), built.state_dict()
    if differing := sorted(found.keys() ^ expected.keys()):
        what = "has" if differing[0] in found else "lacks"
        raise CheckpointError(
            f"the model in memory {what} {differing[0]}, unlike the class of its config: give the "
            "whole causal model, with adapters merged (merge_and_unload()) and not compiled"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"the model in memory has {name} of shape {list(found[name].shape)}, its config "
                f"asks for {list(tensor.shape)}: give the model as it was before other tools "
                "changed it"
            )
    of_config = {path: type(module).__name__ for path, module in built.named_modules()}
    for path, module in model.named_modules():
        own, name = type(module).__name__, of_config.get(path)
        if name not in (own, None):
            logger.warning(
                "%s is a %s, but its config builds a %s, and so will cfsp; register a class of "
                "yours with AutoModelForCausalLM.register",
                *(path or "the model in memory", own, name),
            )
            return


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a config with parameters on the meta device and real buffers."""
    build = model_class(config)  # before the context: finding it may run a small model
    # Rotary frequencies are buffers that are computed at construction and stored nowhere.
    with init_empty_weights(include_buffers=False):
        return build_model(build, config, dtype).eval()


def blocks_of(model: nn.Module, architecture: Architecture) -> nn.ModuleList:
    """Return the list of decoder blocks of a model."""
    blocks = attrgetter(architecture.blocks)(model)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def fill(module: nn.Module, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Make tensors the parameters of a module, on a device; the dictionary is emptied."""
    # What is pinned is copied to a GPU while others are taken up.
    waits = device.type != "cuda"
    for name in list(tensors):
        # One at a time: on another device each would otherwise be there twice.
        moved = {name: tensors.pop(name).to(device, non_blocking=not waits)}
        module.load_state_dict(moved, strict=False, assign=True)
    module.requires_grad_(False)
    module.to(device)


def tie(model: PreTrainedModel, stored: Collection[str]) -> None:
    """Give what nothing is stored of the parameters that its config ties it to.

    What is stored stays as it is: a head may be another matrix than the config says.
    """
    model.tie_weights(missing_keys=model.state_dict().keys() - stored)


def unload(module: nn.Module) -> None:
    """Drop a module's parameters, keeping their shapes and its buffers."""
    for submodule in module.modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            setattr(submodule, name, empty)

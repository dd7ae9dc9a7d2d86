"""Models without weights, into which single tensors are put when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cfsp.architecture.found import Architecture
from cfsp.architecture.model_classes import build_model, model_class_of
from cfsp.architecture.proof import prove
from cfsp.checkpoint.config_widths import (
    modeling_file,
    resized_parts,
    stock_config,
    with_given_widths,
)
from cfsp.checkpoint.modeling_code import pruned_class
from cfsp.settings import DEFAULT_PARTS, PROVED_PARTS, Part


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
    key = f"{model_class_of(stock).__name__} {type(config).__name__} {parts} {fields}"
    if key not in _proved:
        _proved[key] = prove(stock, parts=parts)
    return with_given_widths(_proved[key], config)


_proved: dict[str, Architecture] = {}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of a config's model: stock, or ours for what stock cannot build."""
    if not resized_parts(config):
        return model_class_of(config)
    file = modeling_file(config, architecture_of(config))
    assert file is not None
    return pruned_class(file)


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a config with names and shapes only: everything is on the meta device."""
    return _built(config, torch.float32, lambda: torch.device("meta"))


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a config with parameters on the meta device and real buffers."""
    # Rotary frequencies are buffers that are computed at construction and stored nowhere.
    from accelerate import init_empty_weights

    return _built(config, dtype, lambda: init_empty_weights(include_buffers=False)).eval()


def _built(
    config: PreTrainedConfig, dtype: torch.dtype, without_weights: Callable[[], Any]
) -> PreTrainedModel:
    # Before the context: finding the class may run a small model.
    build = model_class(config)
    with without_weights():
        return build_model(build, config, dtype)


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


def unload(module: nn.Module) -> None:
    """Drop a module's parameters, keeping their shapes and its buffers."""
    for submodule in module.modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            setattr(submodule, name, empty)

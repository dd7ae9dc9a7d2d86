"""Giving the FFNs and attentions of a decoder block another width, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn


def resize_ffn(
    block: nn.Module,
    width: int,
    axes: Mapping[str, tuple[int, int]],
    attributes: Iterable[tuple[str, str, int]],
) -> None:
    """Give an FFN of a block another width; the values of its weights are undefined afterwards.

    Args:
        block: a decoder block.
        width: the new number of channels.
        axes: every parameter that has channels, by its dotted path from the block: which axis
            they lie along, and how often each is there (2 where gate and up share the axis).
        attributes: numbers that tell the width: dotted path of the module from the block, name of
            the attribute, and how often the width it is.
    """
    for path, (axis, times) in axes.items():
        owner, _, name = path.rpartition(".")
        module = block.get_submodule(owner)
        old = getattr(module, name)
        shape = list(old.shape)
        shape[axis] = times * width
        new = torch.empty(shape, dtype=old.dtype, device=old.device)
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    for path, name, times in attributes:
        setattr(block.get_submodule(path), name, times * width)


def resize_attention(
    block: nn.Module,
    path: str,
    groups: int,
    axes: Mapping[str, tuple[int, int]],
    attributes: Iterable[tuple[str, str, int]],
    config_numbers: Mapping[str, int],
) -> None:
    """Give an attention of a block another number of KV groups, as an FFN gets another width.

    Args:
        block: a decoder block.
        path: dotted path from it to the attention.
        groups: the new number of heads of keys and values.
        axes: every parameter that has groups, as of `resize_ffn`.
        attributes: numbers that tell how many, as of `resize_ffn`.
        config_numbers: those that it reads in its config while it runs, each as how often the
            number of groups it is.
    """
    resize_ffn(block, groups, axes, attributes)
    if config_numbers:
        attention: Any = block.get_submodule(path)
        numbers = {name: times * groups for name, times in config_numbers.items()}
        attention.config = ConfigWith(attention.config, numbers)


class ConfigWith:
    """The config of a model with other numbers: what becomes of that config is seen through it."""

    def __init__(self, config: Any, numbers: Mapping[str, int]) -> None:
        self._whole: Any = config._whole if isinstance(config, ConfigWith) else config
        self.__dict__.update(numbers)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_whole":  # asked before there is one, by a copy
            raise AttributeError(name)
        return getattr(self._whole, name)

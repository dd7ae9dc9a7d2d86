"""Giving the FFNs of a decoder block another width, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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

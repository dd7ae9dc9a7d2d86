"""Giving the FFNs and attention layers of decoder blocks another width, or none, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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


def remove_attentions(
    blocks: nn.ModuleList,
    groups_of: Mapping[str, Mapping[str, int]],
    extras: Mapping[str, int | None],
    kinds: Sequence[str] | None,
) -> None:
    """Take out the attention layers that have no KV group left.

    The others take the first places in the cache among those of their kind, so that whoever asks
    the first layer of a kind how long the text is asks one that knows.

    Args:
        blocks: the model's list of decoder blocks.
        groups_of: the number of KV groups of every attention, by block and path.
        extras: how many values an attention returns besides its output, by path; None if it returns
            a tensor.
        kinds: the kind of every block's cache; None if all are alike.
    """
    places: dict[str | None, list[int]] = defaultdict(list)
    staying: dict[str | None, list[Any]] = defaultdict(list)
    for block in sorted(map(int, groups_of)):
        for path, groups in groups_of[str(block)].items():
            kind = kinds[block] if kinds else None
            places[kind].append(block)
            if groups:
                staying[kind].append(blocks[block].get_submodule(path))
            else:
                blocks[block].set_submodule(path, Gone(extras[path]))
    for kind, attentions in staying.items():
        for place, attention in zip(places[kind], attentions, strict=False):
            attention.layer_idx = place


# The name has no "Attention" in it: transformers takes a file with such a class for one that
# brings attention layers of its own.
class Gone(nn.Module):
    """Takes the place of an attention that is gone: nothing is added to the hidden state."""

    def __init__(self, extras: int | None) -> None:
        super().__init__()
        self.extras = extras

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros where an attention returns its output, and None for all else."""
        hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        nothing_BTD = torch.zeros_like(hidden_BTD)
        return nothing_BTD if self.extras is None else (nothing_BTD, *[None] * self.extras)

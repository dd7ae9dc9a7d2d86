"""Modules that take the place of decoder blocks while a model's own forward runs.

Shapes: B windows, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class StandIn(nn.Module):
    """Takes a block's place; only its `forward` is another."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # Models read attributes off their blocks (attention_type, layer_idx) before calling them.
        # Past nn.Module, which would make the block a submodule.
        object.__setattr__(self, "_original", original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_original"), name)


@contextmanager
def replaced(
    blocks: nn.ModuleList, count: int, stand_in: Callable[[int, nn.Module], nn.Module]
) -> Iterator[None]:
    """Put stand-ins in the place of the first blocks, and the blocks back afterwards.

    Args:
        blocks: the model's list of decoder blocks.
        count: how many of them are replaced.
        stand_in: makes one, from the block's index and the block.
    """
    originals = list(blocks[:count])
    try:
        for index, original in enumerate(originals):
            blocks[index] = stand_in(index, original)
        yield
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


def without_hidden_state(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return all other arguments that a model calls a block with."""
    if "hidden_states" in kwargs:
        return args, {name: value for name, value in kwargs.items() if name != "hidden_states"}
    return args[1:], kwargs

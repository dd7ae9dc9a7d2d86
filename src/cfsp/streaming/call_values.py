"""Values in the calls of blocks that differ from window to window.

What a model passes to a block depends on the shape of a batch only, with two exceptions:

    of the text   a value made from token ids, such as an embedding of each layer
    carried       what earlier blocks left for later ones: keys and values that blocks share, or
                  what the block before returned beside the hidden state

Both are kept window by window, so that blocks can be called with any windows.

Shapes: B windows in a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cfsp.errors import UnsupportedModelError

# Where a value is in the arguments of a call: 0 (positional) or 1 (named), then keys and indices.
Place = tuple[Any, ...]


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield everything in nested tuples, lists and dictionaries, with its place."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from leaves(item, (*place, key))
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from leaves(item, (*place, index))
    else:
        yield place, value


def place_in_words(block: int, place: Place) -> str:
    """Return where a value is, in words."""
    return f"argument {'.'.join(str(key) for key in place[1:])} of block {block}"


def with_values(value: Any, values: Mapping[Place, Any], place: Place = ()) -> Any:
    """Return nested tuples, lists and dictionaries with other values in some places."""
    if place in values:
        return values[place]
    if isinstance(value, dict) and value:
        return {key: with_values(item, values, (*place, key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [with_values(item, values, (*place, i)) for i, item in enumerate(value)]
        return type(value)(items)
    return value


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return nested tuples, lists and dictionaries with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(mapped(item, change) for item in value)
    return value


def is_shared(value: Any) -> bool:
    """Return whether a value is a place where blocks leave something for later blocks."""
    return isinstance(value, MutableMapping) and (not isinstance(value, dict) or not value)


def differ(first: Any, second: Any) -> bool:
    """Return whether two values at one place of two calls are different, if they are tensors."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if first is second or first.shape != second.shape:
            return first.shape != second.shape
        return not torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
    return isinstance(first, Tensor) != isinstance(second, Tensor)


class WindowValues:
    """Nested values whose tensors begin with the axis of windows, kept for each window."""

    def __init__(self) -> None:
        self._value_W: dict[int, Any] = {}

    def write(self, windows: Sequence[int], value: Any, what: str) -> None:
        """Keep nested tuples, lists and dictionaries of tensors [B, ...] and constants.

        Raises:
            UnsupportedModelError: a tensor does not begin with the axis of windows.
        """

        def check(tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != len(windows):
                raise UnsupportedModelError(
                    f"{what} has shape {list(tensor.shape)} for {len(windows)} windows; expected "
                    "an axis of windows first, without which blocks cannot be run on windows of "
                    "their own choice"
                )
            return tensor

        mapped(value, check)
        for row, window in enumerate(windows):
            self._value_W[window] = mapped(value, partial(_row, row))

    def keep(self, window: int, value: Any) -> None:
        """Keep the value of a window that passes alone; its tensors need no axis of windows."""
        self._value_W[window] = value

    def read(self, windows: Sequence[int], device: torch.device) -> Any:
        """Return the value of some windows in one batch; None where none was kept."""
        parts = [self._value_W.get(window) for window in windows]
        together = parts[0] if len(parts) == 1 or parts[0] is None else _together(parts)
        return mapped(together, lambda tensor: tensor.to(device))


def _row(row: int, tensor: Tensor) -> Tensor:
    return tensor[row : row + 1].cpu()


def _together(parts: Sequence[Any]) -> Any:
    """Return the nested values of several windows with their tensors concatenated."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {key: _together([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_together(items) for items in zip(*parts, strict=True))
    return first

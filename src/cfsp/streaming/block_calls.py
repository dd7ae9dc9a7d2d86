"""How a model calls its blocks with any windows of a text.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.errors import UnsupportedModelError
from cfsp.streaming.call_form import Extra
from cfsp.streaming.call_recorder import BlockCall
from cfsp.streaming.call_values import Place, WindowValues, differ, is_shared, leaves, moved


class BlockCalls:
    """The calls of every block: one for each number of windows, and what differs from window to
    window.

    Args:
        first: calls that were recorded with some tokens.
        second: calls that were recorded with as many other tokens.
    """  # fmt: skip

    def __init__(self, first: Sequence[BlockCall], second: Sequence[BlockCall]) -> None:
        self._by_size: dict[int, Sequence[BlockCall]] = {}
        self._text_L = [
            {place: WindowValues() for place in _differing(a, b)}
            for a, b in zip(first, second, strict=True)
        ]
        places_L = [list(leaves(call.arguments)) for call in first]
        self._extra_L = [
            {place: value.position for place, value in places if isinstance(value, Extra)}
            for places in places_L
        ]
        self._shared_L = [
            {place: type(value) for place, value in places if is_shared(value)}
            for places in places_L
        ]
        # What the last block that was called returned besides, and what all left in shared places.
        self._extras = {
            position: WindowValues() for at in self._extra_L for position in at.values()
        }
        self._shared = {place: WindowValues() for at in self._shared_L for place in at}
        self._written: set[Place] = set()
        # Rows of tokens, and what a model adds to them, by block and window.
        self._added: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}

    @property
    def depend_on_text(self) -> bool:
        """Whether calls hold values made from token ids."""
        return any(self._text_L)

    def __contains__(self, windows: int) -> bool:
        """Return whether calls of so many windows are known."""
        return windows in self._by_size

    def add(self, windows: Sequence[int], calls: Sequence[BlockCall]) -> None:
        """Add the recorded calls of some windows of the text."""
        for index, call in enumerate(calls):
            values = dict(leaves(call.arguments))
            for place, kept in self._text_L[index].items():
                kept.write(windows, values[place], _told(index, place))
        self._by_size.setdefault(len(windows), calls)

    def add_alone(
        self, window: int, calls: Sequence[BlockCall], added_L: Mapping[int, Tensor]
    ) -> None:
        """Add the recorded calls of a window that passes by itself, such as one with images.

        What is not as in the calls that were added first is kept for each window.

        Args:
            window: its number; those before it were added before.
            calls: of every block.
            added_L: what the model adds to the hidden states that enter a block, 1TD.

        Raises:
            UnsupportedModelError: blocks are called with other arguments.
        """
        first = self._by_size.setdefault(1, calls)
        same: dict[tuple[int, int], bool] = {}
        kept: dict[int, Any] = {}
        for index, call in enumerate(calls):
            known, values = (dict(leaves(each.arguments)) for each in (first[index], call))
            if known.keys() != values.keys():
                raise UnsupportedModelError(
                    f"block {index} is called with other arguments for some windows than for "
                    "others, as it may be with images and without; calibrate on one kind alone"
                )
            for place, value in values.items():
                # Blocks share most values.
                pair = id(known[place]), id(value)
                if pair not in same:
                    same[pair] = not _differ(known[place], value)
                own = self._text_L[index]
                if place not in own and not same[pair]:
                    own[place] = WindowValues()
                    for earlier in range(window):
                        own[place].keep(earlier, known[place])
                if place in own:
                    if id(value) not in kept:
                        kept[id(value)] = moved(value, torch.device("cpu"))
                    own[place].keep(window, kept[id(value)])
        for index, added_BTD in added_L.items():
            row_R = added_BTD[0].any(-1).nonzero().flatten()
            own_RD = added_BTD[0, row_R]
            self._added.setdefault(index, {})[window] = row_R.cpu(), own_RD.cpu()

    def entering(self, index: int, windows: Sequence[int], hidden_BTD: Tensor) -> Tensor:
        """Return what enters a block: the hidden states, and what the model adds before it.

        Args:
            index: of the block.
            windows: numbers of the windows, in the order of the batch.
            hidden_BTD: what left the block before.
        """
        added = self._added.get(index)
        if added is None:
            return hidden_BTD
        hidden_BTD = hidden_BTD.clone()
        for position, window in enumerate(windows):
            if window in added:
                row_R, own_RD = (part.to(hidden_BTD.device) for part in added[window])
                hidden_BTD[position, row_R] += own_RD
        return hidden_BTD

    def of(self, index: int, windows: int) -> BlockCall:
        """Return how the model calls one of its blocks with any batch of so many windows.

        Raises:
            UnsupportedModelError: calls of this block differ from window to window.
        """
        needs = [*self._text_L[index], *self._extra_L[index]]
        needs += [place for place in self._shared_L[index] if place in self._written]
        if needs:
            raise UnsupportedModelError(
                f"{_told(index, needs[0])} differs from window to window, which only a pass "
                "through the dense blocks can follow; use the repair 'ridge' or 'none'"
            )
        return self._by_size[windows][index]

    def compute(
        self, index: int, block: nn.Module, windows: Sequence[int], hidden_BTD: Tensor
    ) -> Tensor:
        """Return what a block makes of some windows; keep what it leaves for later blocks.

        Args:
            index: of the block.
            block: it, with its weights.
            windows: numbers of the windows, in the order of the batch.
            hidden_BTD: what enters it.
        """
        values: dict[Place, Any] = {}
        device = hidden_BTD.device
        for place, text in self._text_L[index].items():
            values[place] = text.read(windows, device)
        for place, position in self._extra_L[index].items():
            values[place] = self._extras[position].read(windows, device)
        for place, kind in self._shared_L[index].items():
            values[place] = kind()
            values[place].update(self._shared[place].read(windows, device) or {})
        call = self._by_size[len(windows)][index].with_values(values)
        output = call.output_of(block, hidden_BTD)
        for position, extras in self._extras.items():
            extras.write(windows, output[position], _returned(index, position))
        for place in self._shared_L[index]:
            if values[place]:
                self._written.add(place)
                self._shared[place].write(windows, dict(values[place]), _told(index, place))
        return call.hidden_of(output)

    def carry(self, after: int) -> bool:
        """Return whether blocks after one need more than its hidden states."""
        return bool(self._written) or any(self._extra_L[after + 1 :])


def _differing(first: BlockCall, second: BlockCall) -> list[Place]:
    """Return the places where two calls with different tokens have different values."""
    others: Mapping[Place, Any] = dict(leaves(second.arguments))
    return [
        place
        for place, value in leaves(first.arguments)
        if place in others and differ(value, others[place])
    ]


def _differ(first: Any, second: Any) -> bool:
    """Return whether values are different, be they tensors or not."""
    constant = bool | int | float | str | None
    if isinstance(first, constant) and isinstance(second, constant):
        return first != second
    return differ(first, second)


def _told(index: int, place: Place) -> str:
    """Return an argument in words."""
    return f"argument {'.'.join(str(key) for key in place[1:])} of block {index}"


def _returned(index: int, position: int) -> str:
    return f"value {position} that block {index} returns"

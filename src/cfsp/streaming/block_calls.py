"""How a model calls its decoder blocks with any windows of a text, learnt from stand-ins.

The model's own forward runs with every block replaced by one that notes the arguments it is given
and returns the hidden state unchanged.

Shapes: N windows, B windows in a batch, T tokens, D hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only, tree_map_with_path

from cfsp.errors import UnsupportedModelError
from cfsp.streaming.stand_in import (
    PLAIN,
    Arguments,
    CallForm,
    Extra,
    HiddenLayout,
    Place,
    differ,
    is_shared,
    leaves,
    place_in_words,
    replaced,
)


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden state that a model passes to one of its blocks."""

    arguments: Arguments
    layout: HiddenLayout = PLAIN.layout  # how the model has its hidden states

    def __call__(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Call a block as the model would, and return its output hidden state."""
        return self.hidden_of(self.output_of(block, hidden_BTD))

    def output_of(self, block: nn.Module, hidden_BTD: Tensor) -> Any:
        """Call a block as the model would, and return all that it returns."""
        args, kwargs = self.arguments
        return block(self.layout.unpack(hidden_BTD), *args, **kwargs)

    def hidden_of(self, output: Any) -> Tensor:
        """Return the hidden state in what a block returned."""
        hidden = output[0] if isinstance(output, tuple | list) else output
        assert isinstance(hidden, Tensor)
        return self.layout.pack(hidden)

    def with_values(self, values: Mapping[Place, Any]) -> BlockCall:
        """Return the same call with other values in some places of its arguments."""
        arguments = tree_map_with_path(
            lambda place, value: values.get(place, value), self.arguments, is_leaf=is_shared
        )
        return replace(self, arguments=arguments)

    def for_training(self) -> BlockCall:
        """Return the same call in float32, and with no tensor of inference mode."""

        def trainable(value: Tensor) -> Tensor:
            dtype = torch.float32 if value.is_floating_point() else value.dtype
            return value.to(dtype, copy=True)

        return replace(self, arguments=tree_map_only(Tensor, trainable, self.arguments))


@dataclass
class Recording:
    """What one forward pass noted: the call of each block, and the hidden state that enters it."""

    calls: list[BlockCall] = field(default_factory=list)
    entering_L: list[Tensor] = field(default_factory=list)


class AllBlocksRecordedError(Exception):
    """Stops the model's forward after its last block; nothing else raises it."""


def record_calls(
    decoder: nn.Module,
    blocks: nn.ModuleList,
    tokens_BT: Tensor,
    form: CallForm = PLAIN,
    more: Mapping[str, Any] | None = None,
    returns_zeros: bool = False,
) -> Recording:
    """Run a model's embeddings and masks on tokens, and what `more` it is given, to its last block.

    Stand-ins return the hidden state, or zeros.
    """
    recording = Recording()

    def note(index: int, hidden: Tensor, arguments: Arguments) -> Any:
        recording.entering_L.append(form.layout.pack(hidden))
        recording.calls.append(BlockCall(arguments, form.layout))
        if index + 1 == len(blocks):
            raise AllBlocksRecordedError
        return form.returned(torch.zeros_like(hidden) if returns_zeros else hidden)

    with replaced(blocks, range(len(blocks)), note):
        try:
            decoder(input_ids=tokens_BT, use_cache=False, **(more or {}))
        except AllBlocksRecordedError:
            return recording
    raise AssertionError("the model's forward did not reach its last block")


class WindowValues:
    """Nested values whose tensors begin with the axis of windows, kept for each window."""

    def __init__(self) -> None:
        self._value_W: dict[int, Any] = {}

    def write(self, windows: Sequence[int], value: Any, what: str) -> None:
        """Keep nested tuples, lists and dictionaries of tensors [B, ...] and constants."""

        def of_row(row: int, tensor: Tensor) -> Tensor:
            if tensor.ndim == 0 or tensor.shape[0] != len(windows):
                raise UnsupportedModelError(
                    f"{what} has shape {list(tensor.shape)} for {len(windows)} windows; expected "
                    "an axis of windows first, without which blocks cannot be run on windows of "
                    "their own choice"
                )
            return tensor[row : row + 1].cpu()

        for row, window in enumerate(windows):
            self._value_W[window] = tree_map_only(Tensor, partial(of_row, row), value)

    def keep(self, window: int, value: Any) -> None:
        """Keep the value of a window that passes alone; its tensors need no axis of windows."""
        self._value_W[window] = value

    def read(self, windows: Sequence[int], device: torch.device) -> Any:
        """Return the value of some windows in one batch; None where none was kept."""

        def together(first: Any, *others: Any) -> Any:
            if not isinstance(first, Tensor):
                return first
            return (torch.cat([first, *others]) if others else first).to(device)

        parts = [self._value_W.get(window) for window in windows]
        return None if parts[0] is None else tree_map(together, *parts)


class BlockCalls:
    """The calls of every block: one for each number of windows, and what differs between windows.

    What a model passes to a block depends on the shape of a batch only, with two exceptions:

        of the text   a value made from token ids, such as an embedding of each layer
        carried       what earlier blocks left for later ones: keys and values that blocks share, or
                      what the block before returned beside the hidden state

    Both are kept window by window, so that blocks can be called with any windows. It is made from
    calls that were recorded with some tokens, and with as many other tokens.
    """

    def __init__(self, first: Sequence[BlockCall], second: Sequence[BlockCall]) -> None:
        self._by_size: dict[int, Sequence[BlockCall]] = {}
        places_L = [leaves(call.arguments) for call in first]
        others_L = [dict(leaves(call.arguments)) for call in second]
        self._text_L = [
            {
                place: WindowValues()
                for place, value in places
                if place in others and differ(value, others[place])
            }
            for places, others in zip(places_L, others_L, strict=True)
        ]
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
                kept.write(windows, values[place], place_in_words(index, place))
        self._by_size.setdefault(len(windows), calls)

    def add_alone(
        self, window: int, calls: Sequence[BlockCall], added_L: Mapping[int, Tensor]
    ) -> None:
        """Add the recorded calls of the next window, where each passes alone.

        What is not as in the calls that were added first is kept for each window; `added_L` is what
        the model adds to what enters a block, 1TD.
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
                        kept[id(value)] = tree_map_only(Tensor, Tensor.cpu, value)
                    own[place].keep(window, kept[id(value)])
        for index, added_BTD in added_L.items():
            row_R = added_BTD[0].any(-1).nonzero().flatten()
            own_RD = added_BTD[0, row_R]
            self._added.setdefault(index, {})[window] = row_R.cpu(), own_RD.cpu()

    def entering(self, index: int, windows: Sequence[int], hidden_BTD: Tensor) -> Tensor:
        """Return what enters a block: what left the one before, and what the model adds to it."""
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
        """Return how the model calls one of its blocks with any batch of so many windows."""
        needs = [*self._text_L[index], *self._extra_L[index]]
        needs += [place for place in self._shared_L[index] if place in self._written]
        if needs:
            raise UnsupportedModelError(
                f"{place_in_words(index, needs[0])} differs from window to window, which only a "
                "pass through the dense blocks can follow; use the repair 'ridge' or 'none'"
            )
        return self._by_size[windows][index]

    def compute(
        self, index: int, block: nn.Module, windows: Sequence[int], hidden_BTD: Tensor
    ) -> Tensor:
        """Return what a block makes of some windows; keep what it leaves for later blocks."""
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
            extras.write(windows, output[position], f"value {position} that block {index} returns")
        for place in self._shared_L[index]:
            if values[place]:
                self._written.add(place)
                what = place_in_words(index, place)
                self._shared[place].write(windows, dict(values[place]), what)
        return call.hidden_of(output)

    def carry(self, after: int) -> bool:
        """Return whether blocks after one need more than its hidden states."""
        return bool(self._written) or any(self._extra_L[after + 1 :])


def _differ(first: Any, second: Any) -> bool:
    """Return whether values are different, be they tensors or not."""
    constant = bool | int | float | str | None
    if isinstance(first, constant) and isinstance(second, constant):
        return first != second
    return differ(first, second)

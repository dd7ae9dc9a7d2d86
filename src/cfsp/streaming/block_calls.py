"""What enters a model's decoder blocks and how it calls them, learnt from stand-ins.

The decoder's own forward runs with every block replaced by one that notes the arguments it is given
and returns the hidden state unchanged.

Shapes: N windows, B windows in a batch, T tokens, D hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only, tree_map_with_path

from cfsp.architecture.small_run import first_tensor
from cfsp.checkpoint.reading import WeightSource, read_tensors
from cfsp.checkpoint.skeleton import fill, unload
from cfsp.errors import UnsupportedModelError
from cfsp.streaming.hidden_states import HiddenStates, Room
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.stand_in import (
    PLAIN,
    Arguments,
    Called,
    CallForm,
    Extra,
    Place,
    differ,
    find_call_form,
    is_shared,
    leaves,
    place_in_words,
    run_through,
    skipped,
)


@dataclass(frozen=True)
class BlockCall:
    """Everything but the hidden state that a model passes to one of its blocks."""

    arguments: Arguments
    form: CallForm

    def __call__(self, block: nn.Module, hidden_BTD: Tensor) -> Tensor:
        """Call a block as the model would, and return its output hidden state."""
        return self.hidden_of(self.output_of(block, hidden_BTD))

    def output_of(self, block: nn.Module, hidden_BTD: Tensor) -> Any:
        """Call a block as the model would, and return all that it returns."""
        args, kwargs = self.arguments
        return block(self.form.unpack(hidden_BTD), *args, **kwargs)

    def hidden_of(self, output: Any) -> Tensor:
        """Return the hidden state in what a block returned."""
        return self.form.pack(first_tensor(output))

    def with_values(self, values: Mapping[Place, Any]) -> BlockCall:
        """Return the same call with other values in some places of its arguments."""
        arguments = tree_map_with_path(
            lambda place, value: values.get(place, value), self.arguments, is_leaf=is_shared
        )
        return replace(self, arguments=arguments)


def _run(decoder: nn.Module, tokens_BT: Tensor) -> Tensor:
    return first_tensor(decoder(input_ids=tokens_BT, use_cache=False))


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

    Both are kept window by window, so that blocks can be called with any windows. What is of the
    text shows when the first window is recorded again with other tokens. While calls are learnt the
    decoder needs weights for all but its blocks.
    """

    def __init__(
        self, decoder: nn.Module, blocks: nn.ModuleList, tokens_NT: Tensor, device: torch.device
    ) -> None:
        self._decoder, self._blocks = decoder, blocks
        self._tokens_NT, self._device = tokens_NT, device
        self._form = find_call_form(partial(_run, decoder), blocks, device)
        self._by_size: dict[int, Sequence[BlockCall]] = {}
        one_BT = tokens_NT[:1]
        other_BT = tokens_NT.flatten().roll(1)[: one_BT.numel()].view_as(one_BT)
        (first, _), (second, _) = self._record(one_BT), self._record(other_BT)
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

    def _record(self, tokens_BT: Tensor) -> tuple[list[BlockCall], Tensor]:
        """Return how the model calls each block with some tokens, and what enters the first."""
        called: list[Called] = []
        tokens_BT = tokens_BT.to(self._device)
        run_through(partial(_run, self._decoder), tokens_BT, self._blocks, self._form, called)
        calls = [BlockCall(each.arguments, self._form) for each in called]
        return calls, self._form.pack(called[0].given)

    def learn(self, windows: range) -> Tensor:
        """Note how blocks are called with some windows; return what enters the first, BTD."""
        calls, entering_BTD = self._record(self._tokens_NT[windows.start : windows.stop])
        for index, call in enumerate(calls):
            values = dict(leaves(call.arguments))
            for place, kept in self._text_L[index].items():
                kept.write(windows, values[place], place_in_words(index, place))
        self._by_size.setdefault(len(windows), calls)
        return entering_BTD

    def learn_sizes(self, sizes: Iterable[int]) -> None:
        """Learn how blocks are called with so many windows, each number that is not known yet."""
        for size in set(sizes) - set(self._by_size):
            self.learn(range(size))

    def embed(self, batches: Iterable[slice], room: Room, *, resumed: bool = False) -> HiddenStates:
        """Learn the calls of batches, and return what enters the first block."""
        hidden: HiddenStates | None = None
        for batch in batches:
            own = range(batch.start, batch.stop)
            if resumed and len(own) in self._by_size and not any(self._text_L):
                continue
            entering_BTD = self.learn(own)
            if hidden is None:
                hidden = room((*self._tokens_NT.shape, entering_BTD.shape[-1]))
            if not resumed:
                hidden.write(batch, entering_BTD)
        assert hidden is not None
        return hidden

    def of(self, index: int, windows: int) -> BlockCall:
        """Return how the model calls one of its blocks with any batch of so many windows."""
        needs = [*self._text_L[index], *self._extra_L[index]]
        needs += [place for place in self._shared_L[index] if place in self._written]
        if needs:
            raise UnsupportedModelError(
                f"{place_in_words(index, needs[0])} differs from window to window, which only a "
                "pass through the dense blocks can follow"
            )
        if len(self._form.rest) > 1:
            raise UnsupportedModelError("its blocks keep several hidden states of a token")
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


@contextmanager
def weights_of_start(
    decoder: nn.Module, blocks: nn.ModuleList, source: WeightSource, runtime: Runtime
) -> Iterator[None]:
    """Read everything of a decoder but its blocks, and drop it afterwards."""
    path = source.architecture.decoder
    without_blocks = partial(skipped, blocks, range(len(blocks)), PLAIN)
    with without_blocks():
        tensors = read_tensors(decoder, f"{path}." if path else "", source, runtime.dtype)
        fill(decoder, tensors, runtime.device)
    yield
    with without_blocks():
        unload(decoder)

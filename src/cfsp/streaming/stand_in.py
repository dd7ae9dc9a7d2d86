"""Modules that take the place of decoder blocks while a model's own forward runs.

So no family's signature, masks, norms or heads need to be known. What changes in one block changes
nothing before it: the forward can also be resumed at a block, on hidden states of an earlier run.

Shapes: B windows, T tokens, D hidden (all that a token has, if a model keeps several streams).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cfsp.architecture.activations import hidden_state

# What else a model calls a block with: positional arguments after the hidden state, and named ones.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# What a block returns, from its index, the hidden state as the model has it, and all else.
Answer = Callable[[int, Tensor, Arguments], Any]


@dataclass(frozen=True)
class HiddenLayout:
    """Where a model's hidden states have windows, tokens and the rest; here they are [B, T, D]."""

    # Of the windows; the next is that of the tokens.
    axis: int = 0
    # Lengths of the other axes.
    rest: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the model's hidden states are BTD themselves."""
        return self.axis == 0 and len(self.rest) <= 1

    def pack(self, hidden: Tensor) -> Tensor:
        """Return a model's hidden state as BTD."""
        if self.is_plain:
            return hidden
        return hidden.movedim((self.axis, self.axis + 1), (0, 1)).flatten(2)

    def unpack(self, hidden_BTD: Tensor) -> Tensor:
        """Return a hidden state BTD as the model has it."""
        if self.is_plain:
            return hidden_BTD
        split = hidden_BTD.reshape(*hidden_BTD.shape[:2], *self.rest)
        return split.movedim((0, 1), (self.axis, self.axis + 1))


@dataclass(frozen=True)
class Extra:
    """Stands for what a block returns besides the hidden state, at a position of the tuple."""

    position: int


@dataclass(frozen=True)
class CallForm:
    """How a model takes hidden states from its blocks."""

    # How many values a block returns besides, in a tuple; None if it returns a tensor.
    extras: int | None = None
    layout: HiddenLayout = HiddenLayout()

    def returned(self, hidden: Tensor) -> Any:
        """Return what a block would that leaves a model's hidden state as it is."""
        if self.extras is None:
            return hidden
        return (hidden, *(Extra(position) for position in range(1, self.extras + 1)))


PLAIN = CallForm()


class StandIn(nn.Module):
    """Takes a block's place; only its forward is another."""

    def __init__(self, original: nn.Module, index: int, answer: Answer) -> None:
        super().__init__()
        self._index, self._answer = index, answer
        # Models read attributes off their blocks (attention_type, layer_idx) before calling them.
        # Past nn.Module, which would make the block a submodule.
        object.__setattr__(self, "_original", original)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the answer."""
        hidden = hidden_state(args, kwargs)
        if "hidden_states" in kwargs:
            del kwargs["hidden_states"]
        else:
            args = args[1:]
        return self._answer(self._index, hidden, (args, kwargs))


@contextmanager
def replaced(blocks: nn.ModuleList, indices: Collection[int], answer: Answer) -> Iterator[None]:
    """Put stand-ins in the place of some blocks, and the blocks back afterwards."""
    originals = {index: blocks[index] for index in indices}
    try:
        for index, original in originals.items():
            blocks[index] = StandIn(original, index, answer)
        yield
    finally:
        for index, original in originals.items():
            blocks[index] = original


@contextmanager
def skipped(blocks: nn.ModuleList, indices: Collection[int], form: CallForm) -> Iterator[None]:
    """Let some blocks leave the hidden state as it is, as if they were not there."""
    with replaced(blocks, indices, lambda index, hidden, arguments: form.returned(hidden)):
        yield


@contextmanager
def resumed_at(
    blocks: nn.ModuleList, first: int, hidden: Tensor, form: CallForm = PLAIN
) -> Iterator[None]:
    """Let the model compute its blocks from `first` on only, on a given hidden state.

    That is of the tokens that the model is then called with, and as the model has it (see
    `HiddenLayout`).
    """

    def answer(index: int, own: Tensor, arguments: Arguments) -> Any:
        return form.returned(hidden if index == first - 1 else own)

    with replaced(blocks, range(first), answer):
        yield


@contextmanager
def hidden_states_entering(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Note the hidden state (BTD) that enters every block while the model runs once."""
    entering_L: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering_L.append(hidden_state(args, kwargs))

    with ExitStack() as stack:
        for block in blocks:
            handle = block.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield entering_L

"""A whole model's forward from one of its blocks on, with hidden states of an earlier run.

What changes in one block changes nothing before it. The model's own forward runs, with stand-ins
for the blocks before, so that no family's masks, norms or heads need to be known.

Shapes: B windows, T tokens, D hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from cfsp.architecture.activations import hidden_state
from cfsp.streaming.call_form import PLAIN, CallForm
from cfsp.streaming.stand_in import StandIn, replaced


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


@contextmanager
def resumed_at(
    blocks: nn.ModuleList, first: int, hidden_BTD: Tensor, form: CallForm = PLAIN
) -> Iterator[None]:
    """Let the model compute its blocks from `first` on only, on a given hidden state.

    Args:
        blocks: the model's list of decoder blocks.
        first: index of the first block that computes.
        hidden_BTD: what enters it, as the model has it (see `HiddenLayout`); of the tokens that
            the model is then called with.
        form: how the model takes hidden states from its blocks.
    """

    def stand_in(index: int, original: nn.Module) -> nn.Module:
        return _Given(original, hidden_BTD if index == first - 1 else None, form)

    with replaced(blocks, first, stand_in):
        yield


@contextmanager
def skipped(blocks: nn.ModuleList, indices: Collection[int], form: CallForm) -> Iterator[None]:
    """Let some blocks leave the hidden state as it is, as if they were not there.

    Args:
        blocks: the model's list of decoder blocks.
        indices: which of them.
        form: how the model takes hidden states from its blocks.
    """
    originals = {index: blocks[index] for index in indices}
    try:
        for index, original in originals.items():
            blocks[index] = _Given(original, None, form)
        yield
    finally:
        for index, original in originals.items():
            blocks[index] = original


class _Given(StandIn):
    """Returns what is given, or what it is called with."""

    def __init__(self, original: nn.Module, given_BTD: Tensor | None, form: CallForm) -> None:
        super().__init__(original)
        self._given_BTD = given_BTD
        self._form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given_BTD = hidden_state(args, kwargs) if self._given_BTD is None else self._given_BTD
        return self._form.returned(given_BTD)

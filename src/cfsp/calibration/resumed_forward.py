"""A whole model's forward from one of its blocks on, with hidden states of an earlier run.

What changes in one block changes nothing before it. The model's own forward runs, with stand-ins
for the blocks before, so that no family's masks, norms or heads need to be known.

Shapes: B windows, T tokens, D hidden, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def hidden_states_entering(blocks: nn.ModuleList) -> Iterator[list[Tensor]]:
    """Note the hidden state (BTD) that enters every block while the model runs once."""
    entering_L: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering_L.append(_hidden_state(args, kwargs))

    with ExitStack() as stack:
        for block in blocks:
            handle = block.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield entering_L


@contextmanager
def resumed_at(blocks: nn.ModuleList, first: int, hidden_BTD: Tensor) -> Iterator[None]:
    """Let the model compute its blocks from `first` on only, on a given hidden state.

    Args:
        blocks: the model's list of decoder blocks.
        first: index of the first block that computes.
        hidden_BTD: what enters it; of the tokens that the model is then called with.
    """
    originals = list(blocks[:first])
    try:
        for index, original in enumerate(originals):
            is_last = index == first - 1
            blocks[index] = _StandIn(original, hidden_BTD if is_last else None)
        yield
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


class _StandIn(nn.Module):
    """Takes a block's place and returns what is given, or what it is called with."""

    def __init__(self, original: nn.Module, given_BTD: Tensor | None) -> None:
        super().__init__()
        # Models read attributes off their blocks (attention_type) before they call them.
        object.__setattr__(self, "_original", original)
        object.__setattr__(self, "_given_BTD", given_BTD)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_original"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given_BTD: Tensor | None = object.__getattribute__(self, "_given_BTD")
        return _hidden_state(args, kwargs) if given_BTD is None else given_BTD


def _hidden_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden_BTD = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    assert isinstance(hidden_BTD, Tensor)
    return hidden_BTD

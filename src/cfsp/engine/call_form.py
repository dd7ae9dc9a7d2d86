"""The form in which a model hands hidden states to its blocks and takes them back.

Most models give a block [B, T, D] and take a tensor of the same shape. Some take a tuple, some
give the next block what else this one returned, some have an axis of several streams. Which it is
shows when stand-ins take the place of all blocks: only with the right form does the model's own
forward run to its end.

Shapes: B windows, T tokens, D hidden (all that a token has, if a model keeps several streams).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.engine.stand_in import StandIn, hidden_state, replaced
from cfsp.errors import UnsupportedModelError

# What blocks return: a tensor, or a tuple of the hidden state and so many values more.
_RETURNS = (None, 0, 1, 2, 3)


@dataclass(frozen=True)
class HiddenLayout:
    """Where a model's hidden states have windows, tokens and the rest.

    The engine keeps them as [B, T, D], whatever a model does.

    Attributes:
        axis: that of the windows; the next is that of the tokens.
        rest: lengths of the other axes.
    """

    axis: int = 0
    rest: tuple[int, ...] = ()

    @staticmethod
    def of(hidden: Tensor, windows: int, tokens: int) -> HiddenLayout | None:
        """Return the layout of a model's hidden state; None if it has no such axes."""
        shape = tuple(hidden.shape)
        for axis in range(len(shape) - 1):
            if shape[axis : axis + 2] == (windows, tokens):
                rest = shape[:axis] + shape[axis + 2 :]
                return HiddenLayout(axis, rest) if rest else None
        return None

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


PLAIN_LAYOUT = HiddenLayout()


@dataclass(frozen=True)
class Extra:
    """Stands for what a block returns besides the hidden state.

    Attributes:
        position: in the tuple.
    """

    position: int


@dataclass(frozen=True)
class CallForm:
    """How a model takes hidden states from its blocks.

    Attributes:
        extras: how many values a block returns besides, in a tuple; None if it returns a tensor.
        layout: of hidden states.
    """

    extras: int | None = None
    layout: HiddenLayout = PLAIN_LAYOUT

    def returned(self, hidden: Tensor) -> Any:
        """Return what a block would that leaves a model's hidden state as it is."""
        if self.extras is None:
            return hidden
        return (hidden, *(Extra(position) for position in range(1, self.extras + 1)))


PLAIN = CallForm()


class _WrongFormError(Exception):
    """The model did not take a hidden state as it was given."""


def find_call_form(
    run: Callable[[], Tensor], blocks: nn.ModuleList, windows: int, tokens: int
) -> CallForm:
    """Try forms until the model's own forward runs to its end through stand-ins.

    Args:
        run: calls the model and returns what leaves it, [B, T, ...]. It needs no blocks.
        blocks: its list of decoder blocks.
        windows: B that it is called with.
        tokens: T.

    Raises:
        UnsupportedModelError: it calls blocks twice or not at all, changes hidden states between
            them, or takes none of the forms.
    """
    reasons: list[str] = []
    for extras in _RETURNS:
        called: list[_Called] = []
        form = CallForm(extras)

        def stand_in(
            index: int,
            original: nn.Module,
            form: CallForm = form,
            called: list[_Called] = called,
        ) -> nn.Module:
            return _Probe(original, index, form, called)

        try:
            with replaced(blocks, len(blocks), stand_in):
                output = run()
            if tuple(output.shape[:2]) != (windows, tokens):
                raise _WrongFormError(f"it ends with a tensor of shape {list(output.shape)}")
        except Exception as error:  # whatever a model does with a value that it does not expect
            if not called:
                raise
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0])
            continue
        return CallForm(extras, _checked_layout(called, blocks, windows, tokens))
    raise UnsupportedModelError(
        f"{type(blocks[0]).__name__} cannot be run by itself: the model takes neither a tensor nor "
        f"a tuple from it ({reasons[0]}); please report the model type"
    )


@dataclass(frozen=True)
class _Called:
    index: int
    hidden: Tensor


class _Probe(StandIn):
    def __init__(
        self, original: nn.Module, index: int, form: CallForm, called: list[_Called]
    ) -> None:
        super().__init__(original)
        self._index, self._form, self._called = index, form, called

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_state(args, kwargs)
        if not isinstance(hidden, Tensor):
            raise _WrongFormError(f"block {self._index} is given a {type(hidden).__name__}")
        if self._called and self._called[-1].hidden.shape != hidden.shape:
            raise _WrongFormError(f"block {self._index} is given shape {list(hidden.shape)}")
        self._called.append(_Called(self._index, hidden))
        return self._form.returned(hidden)


def _checked_layout(
    called: Sequence[_Called], blocks: nn.ModuleList, windows: int, tokens: int
) -> HiddenLayout:
    name = type(blocks[0]).__name__
    order = [call.index for call in called]
    if order != list(range(len(blocks))):
        raise UnsupportedModelError(
            f"the model calls its blocks ({name}) in the order {_short(order)}, not each once and "
            "one after the other; its hidden states cannot be streamed through them"
        )
    for before, after in pairwise(called):
        if before.hidden is not after.hidden and not torch.allclose(
            before.hidden, after.hidden, rtol=0, atol=0, equal_nan=True
        ):
            raise UnsupportedModelError(
                f"the model changes the hidden states between blocks {before.index} and "
                f"{after.index} ({name}), so that blocks cannot be run one after the other"
            )
    layout = HiddenLayout.of(called[0].hidden, windows, tokens)
    if layout is None:
        raise UnsupportedModelError(
            f"block 0 ({name}) is given hidden states of shape {list(called[0].hidden.shape)}; "
            f"expected an axis of {windows} windows followed by one of {tokens} tokens"
        )
    return layout


def _short(order: Sequence[int]) -> str:
    shown = ", ".join(map(str, order[:8]))
    return f"{shown}, ..." if len(order) > 8 else shown

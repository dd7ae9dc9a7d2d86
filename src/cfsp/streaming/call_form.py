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

from cfsp.architecture.activations import hidden_state
from cfsp.errors import UnsupportedModelError
from cfsp.streaming.call_values import differ, leaves
from cfsp.streaming.stand_in import StandIn, replaced, without_hidden_state

# Windows and tokens of the batch that forms are tried on.
_PROBED = (2, 3)

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
    run: Callable[[Tensor], Tensor], blocks: nn.ModuleList, device: torch.device
) -> CallForm:
    """Try forms until the model's own forward runs to its end through stand-ins.

    Args:
        run: calls the model with tokens_BT and returns what leaves it, [B, T, ...]. It needs no
            blocks.
        blocks: its list of decoder blocks.
        device: of the tokens.

    Raises:
        UnsupportedModelError: it calls blocks twice or not at all, changes hidden states between
            them, needs more of what came before than the last hidden state, or takes none of the
            forms.
    """
    tokens_BT = torch.zeros(_PROBED, dtype=torch.long, device=device)
    reasons: list[str] = []
    for extras in _RETURNS:
        form = CallForm(extras)
        called: list[_Called] = []
        try:
            output = _run_through(run, tokens_BT, blocks, form, called)
            if tuple(output.shape[:2]) != _PROBED:
                raise _WrongFormError(f"it ends with a tensor of shape {list(output.shape)}")
        except Exception as error:  # whatever a model does with a value that it does not expect
            if not called:
                raise
            reasons.append(f"{type(error).__name__}: {error}".partition("\n")[0])
            continue
        _check_order(called, blocks)
        last = called[-1].returned
        others: list[_Called] = []
        other = _run_through(run, tokens_BT, blocks, form, others, last=last, changed=True)
        _check_independence(called, others, blocks)
        of_text = _run_through(run, tokens_BT + 1, blocks, form, [], last=last)
        if differ(output, other) or differ(output, of_text):
            raise UnsupportedModelError(
                f"what comes after the last block ({type(blocks[-1]).__name__}) needs more than "
                "its hidden states, so that blocks cannot be run one after the other"
            )
        return CallForm(extras, _layout(called, blocks))
    raise UnsupportedModelError(
        f"{type(blocks[0]).__name__} cannot be run by itself: the model takes neither a tensor nor "
        f"a tuple from it ({reasons[0]}); please report the model type"
    )


@dataclass(frozen=True)
class _Called:
    """A call of a block.

    Attributes:
        index: of the block.
        given: the hidden state that it was given.
        returned: the one that it returned.
        arguments: everything else that it was given.
    """

    index: int
    given: Tensor
    returned: Tensor
    arguments: tuple[Any, ...]


def _run_through(
    run: Callable[[Tensor], Tensor],
    tokens_BT: Tensor,
    blocks: nn.ModuleList,
    form: CallForm,
    called: list[_Called],
    *,
    last: Tensor | None = None,
    changed: bool = False,
) -> Tensor:
    """Run the model through stand-ins; note their calls.

    Args:
        run: calls the model.
        tokens_BT: with these tokens.
        blocks: its list of decoder blocks.
        form: of what stand-ins return.
        called: their calls are appended to it.
        last: what the last of them returns; None for what it is given.
        changed: whether the others change the hidden state.
    """
    end = len(blocks) - 1

    def stand_in(index: int, original: nn.Module) -> nn.Module:
        return _Probe(original, index, form, called, last if index == end else None, changed)

    with replaced(blocks, len(blocks), stand_in):
        return run(tokens_BT)


class _Probe(StandIn):
    def __init__(
        self,
        original: nn.Module,
        index: int,
        form: CallForm,
        called: list[_Called],
        given: Tensor | None,
        changed: bool,
    ) -> None:
        super().__init__(original)
        self._index, self._form, self._called = index, form, called
        self._given, self._changed = given, changed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = hidden_state(args, kwargs)
        if not isinstance(hidden, Tensor):
            raise _WrongFormError(f"block {self._index} is given a {type(hidden).__name__}")
        if self._called and self._called[-1].returned.shape != hidden.shape:
            raise _WrongFormError(f"block {self._index} is given shape {list(hidden.shape)}")
        result = self._given
        if result is None:
            result = hidden / 2 + 1 if self._changed else hidden
        arguments = without_hidden_state(args, kwargs)
        self._called.append(_Called(self._index, hidden, result, arguments))
        return self._form.returned(result)


def _check_order(called: Sequence[_Called], blocks: nn.ModuleList) -> None:
    name = type(blocks[0]).__name__
    order = [call.index for call in called]
    if order != list(range(len(blocks))):
        raise UnsupportedModelError(
            f"the model calls its blocks ({name}) in the order {_short(order)}, not each once and "
            "one after the other; its hidden states cannot be streamed through them"
        )
    for before, after in pairwise(called):
        if differ(before.returned, after.given):
            raise UnsupportedModelError(
                f"the model changes the hidden states between blocks {before.index} and "
                f"{after.index} ({name}), so that blocks cannot be run one after the other"
            )


def _check_independence(
    first: Sequence[_Called], second: Sequence[_Called], blocks: nn.ModuleList
) -> None:
    """Check that nothing but the hidden state depends on what earlier blocks return."""
    for before, after in zip(first, second, strict=True):
        values = dict(leaves(after.arguments))
        for place, value in leaves(before.arguments):
            if place not in values or differ(value, values[place]):
                argument = ".".join(str(key) for key in place[1:])
                raise UnsupportedModelError(
                    f"argument {argument} of block {before.index} ({type(blocks[0]).__name__}) is "
                    "made from hidden states of earlier blocks, so that blocks cannot be run one "
                    "after the other"
                )


def _layout(called: Sequence[_Called], blocks: nn.ModuleList) -> HiddenLayout:
    given = called[0].given
    layout = HiddenLayout.of(given, *_PROBED)
    if layout is None:
        windows, tokens = _PROBED
        raise UnsupportedModelError(
            f"block 0 ({type(blocks[0]).__name__}) is given hidden states of shape "
            f"{list(given.shape)}; expected an axis of {windows} windows followed by one of "
            f"{tokens} tokens"
        )
    return layout


def _short(order: Sequence[int]) -> str:
    shown = ", ".join(map(str, order[:8]))
    return f"{shown}, ..." if len(order) > 8 else shown

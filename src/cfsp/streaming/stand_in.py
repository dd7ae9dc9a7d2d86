"""Modules that take the place of decoder blocks while a model's own forward runs.

So no family's signature, masks, norms or heads need to be known. What changes in one block changes
nothing before it: the forward can also be resumed at a block, on hidden states of an earlier run.

Most models give a block [B, T, D] and take a tensor of the same shape. Some take a tuple, some
give the next block what else this one returned, some have an axis of several streams. Which it is
shows when stand-ins take the place of all blocks: only with the right form does the model's own
forward run to its end.

Shapes: B windows, T tokens, D hidden (all that a token has, if a model keeps several streams).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import MappingKey, tree_flatten_with_path

from cfsp.architecture.activations import hidden_state
from cfsp.errors import UnknownModelError, UnsupportedModelError, first_line

_PROBED = (2, 3)  # windows and tokens of the batch that forms are tried on

# What blocks return: a tensor, or a tuple of the hidden state and so many values more.
_RETURNS = (None, 0, 1, 2, 3)

# What else a model calls a block with: positional arguments after the hidden state, and named ones.
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# What a block returns, from its index, the hidden state as the model has it, and all else.
Answer = Callable[[int, Tensor, Arguments], Any]
Replaced = AbstractContextManager[None]  # while it is open stand-ins answer


# Where a value is in the arguments of a call: the keys of `torch.utils._pytree`.
Place = tuple[Any, ...]


def leaves(arguments: Arguments) -> list[tuple[Place, Any]]:
    """Return everything in nested tuples, lists and dictionaries, with its place."""
    return tree_flatten_with_path(arguments, is_leaf=is_shared)[0]


def place_in_words(block: int, place: Place) -> str:
    """Return where a value is, in words."""
    names = [key.key if isinstance(key, MappingKey) else key.idx for key in place[1:]]
    return f"argument {'.'.join(map(str, names))} of block {block}"


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


@dataclass(frozen=True)
class Extra:
    """Stands for what a block returns besides the hidden state, at a position of the tuple."""

    position: int


@dataclass(frozen=True)
class CallForm:
    """How a model gives its blocks hidden states and takes them; here they are [B, T, D]."""

    # How many values a block returns besides, in a tuple; None if it returns a tensor.
    extras: int | None = None
    axis: int = 0  # of the windows; the next is that of the tokens
    rest: tuple[int, ...] = ()  # lengths of the other axes

    def pack(self, hidden: Tensor) -> Tensor:
        """Return a model's hidden state as BTD."""
        return hidden.movedim((self.axis, self.axis + 1), (0, 1)).flatten(2)

    def unpack(self, hidden_BTD: Tensor) -> Tensor:
        """Return a hidden state BTD as the model has it."""
        split = hidden_BTD.reshape(*hidden_BTD.shape[:2], *self.rest)
        return split.movedim((0, 1), (self.axis, self.axis + 1))

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


def skipped(blocks: nn.ModuleList, indices: Collection[int], form: CallForm) -> Replaced:
    """Let some blocks leave the hidden state as it is, as if they were not there."""
    return replaced(blocks, indices, lambda index, hidden, arguments: form.returned(hidden))


def resumed_at(blocks: nn.ModuleList, first: int, hidden: Tensor, form: CallForm) -> Replaced:
    """Let the model compute its blocks from `first` on only, on a hidden state as it has them."""

    def answer(index: int, own: Tensor, arguments: Arguments) -> Any:
        return form.returned(hidden if index == first - 1 else own)

    return replaced(blocks, range(first), answer)


@contextmanager
def hidden_states_entering(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Note the hidden state, as the model has it, that enters each block while it runs once."""
    entering_L: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering_L.append(hidden_state(args, kwargs))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        yield entering_L


class Called(NamedTuple):
    """A call of a block: the hidden states that it was given and returned, and all else."""

    given: Tensor
    returned: Tensor
    arguments: Arguments


def find_call_form(
    run: Callable[[Tensor], Tensor], blocks: nn.ModuleList, device: torch.device
) -> CallForm:
    """Try forms until the model's own forward runs to its end through stand-ins.

    `run` calls the model with tokens_BT and returns what leaves it, [B, T, ...]. That it calls each
    block once, on what the one before gives, `cfsp.architecture.proof` has proved.

    Raises:
        UnsupportedModelError: it needs more of what came before than the last hidden state, or
            takes none of the forms.
    """
    tokens_BT = torch.zeros(_PROBED, dtype=torch.long, device=device)
    name, reasons = type(blocks[0]).__name__, []
    for extras in _RETURNS:
        form = CallForm(extras)
        called: list[Called] = []
        try:
            output = run_through(run, tokens_BT, blocks, form, called)
            if tuple(output.shape[:2]) != _PROBED:
                raise ValueError(f"it ends with a tensor of shape {list(output.shape)}")
        except Exception as error:  # whatever a model does with a value that it does not expect
            if not called:
                raise
            reasons.append(first_line(error))
            continue
        last = called[-1].returned
        others: list[Called] = []
        other = run_through(run, tokens_BT, blocks, form, others, last=last, changed=True)
        _check_independence(called, others, name)
        of_text = run_through(run, tokens_BT + 1, blocks, form, [], last=last)
        if differ(output, other) or differ(output, of_text):
            raise UnsupportedModelError(
                f"what comes after the last block ({type(blocks[-1]).__name__}) needs more than "
                "its hidden states, so that blocks cannot be run one after the other"
            )
        shape = tuple(called[0].given.shape)
        axis = next(i for i in range(len(shape) - 1) if shape[i : i + 2] == _PROBED)
        return CallForm(extras, axis, shape[:axis] + shape[axis + 2 :])
    raise UnknownModelError(
        f"{name} cannot be run by itself: the model takes neither a tensor nor a tuple from it "
        f"({reasons[0]})"
    )


def run_through(
    run: Callable[[Tensor], Tensor],
    tokens_BT: Tensor,
    blocks: nn.ModuleList,
    form: CallForm,
    called: list[Called],
    *,
    last: Tensor | None = None,
    changed: bool = False,
) -> Tensor:
    """Run the model through stand-ins, which may change hidden states, and append their calls."""

    def answer(index: int, hidden: Any, arguments: Arguments) -> Any:
        if not isinstance(hidden, Tensor):
            raise ValueError(f"block {index} is given a {type(hidden).__name__}")
        if called and called[-1].returned.shape != hidden.shape:
            raise ValueError(f"block {index} is given shape {list(hidden.shape)}")
        result = hidden / 2 + 1 if changed else hidden
        if last is not None and index == len(blocks) - 1:
            result = last
        called.append(Called(hidden, result, arguments))
        return form.returned(result)

    with replaced(blocks, range(len(blocks)), answer):
        return run(tokens_BT)


def _check_independence(first: Sequence[Called], second: Sequence[Called], name: str) -> None:
    """Check that nothing but the hidden state depends on what earlier blocks return."""
    for index, (before, after) in enumerate(zip(first, second, strict=True)):
        values = dict(leaves(after.arguments))
        for place, value in leaves(before.arguments):
            if place not in values or differ(value, values[place]):
                raise UnsupportedModelError(
                    f"{place_in_words(index, place)} ({name}) is made from hidden states of "
                    "earlier blocks, so that blocks cannot be run one after the other"
                )

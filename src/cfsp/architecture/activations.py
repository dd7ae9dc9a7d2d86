"""What enters the down matrices of a block's FFN units, seen while the block runs.

A dense FFN has one down matrix, mostly a module that a hook can watch. Experts are one module,
which picks the rows of each expert itself: the products with their matrices are watched. Those that
follow transformers' protocol run one by one meanwhile.

Shapes: R rows (tokens of a batch), K experts that a token is routed to, E experts, D hidden, F FFN
channels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cfsp.architecture.found import Unit
from cfsp.errors import UnknownModelError

# The position of a unit among those of the block, the index of an FFN in it, its activations
# (rows x F) or what it adds to the output of its unit (rows x D), and which token each row is.
OnRows = Callable[[int, int, Tensor, Tensor], None]

# Products whose second operand may be a weight.
_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm"})
# What every version of transformers gives to the experts that follow its protocol.
_PROTOCOL = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def hidden_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden state among the arguments that a model calls a block with."""
    hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return hidden


@contextmanager
def observed_activations(
    block: nn.Module, units: Sequence[Unit], on_rows: OnRows, on_output: OnRows | None = None
) -> Iterator[None]:
    """Show the input of every down matrix of a block's FFN units whenever the block runs.

    `on_output` is given what every expert that has tokens adds to the output of its unit, times the
    router's weight; so are the activations of experts that `on_rows` is given: what they are worth
    in the block's output. What cannot be seen is an `UnsupportedModelError` while the block runs.
    """
    tokens: list[int] = []

    def before_block(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        *lengths, _hidden = hidden_state(args, kwargs).shape
        every = math.prod(lengths)
        # One of its axes may be that of streams.
        tokens[:] = [every, *(every // length for length in lengths if len(lengths) > 2)]

    with ExitStack() as stack:
        stack.enter_context(block.register_forward_pre_hook(before_block, with_kwargs=True))
        for position, unit in enumerate(units):
            watch = _Watch(block, unit, position, tokens, on_rows, on_output)
            stack.enter_context(watch.while_it_runs())
        yield


@contextmanager
def observed_sublayers(
    block: nn.Module, units: Sequence[Unit], seen: dict[int, Tensor]
) -> Iterator[None]:
    """Keep in `seen`, by the position of its unit, the hidden state after each attention."""

    def before(position: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen[position] = hidden_state(args, kwargs)

    with ExitStack() as stack:
        for position, unit in enumerate(units):
            if unit.after is not None:
                after = block.get_submodule(unit.after)
                entered = partial(before, position)
                stack.enter_context(after.register_forward_pre_hook(entered, with_kwargs=True))
        yield


@dataclass(frozen=True)
class _Watch:
    """One unit of a block that is watched; `tokens` may be in a batch, `seen` are the FFNs."""

    block: nn.Module
    unit: Unit
    position: int
    tokens: list[int]
    on_rows: OnRows
    on_output: OnRows | None
    seen: set[int] = field(default_factory=set)

    @property
    def module(self) -> Any:
        return self.block.get_submodule(self.unit.path)

    def error(self, found: str) -> UnknownModelError:
        noun = "FFN" if self.unit.part == "ffn" else "attention"
        where = f"the {noun} {self.unit.path}".rstrip()
        return UnknownModelError(
            f"{where} ({type(self.module).__name__}) of block {self.unit.block} {found}"
        )

    def check_rows(self, rows: int) -> None:
        if rows not in (0, *self.tokens):
            raise self.error(
                f"is given {rows} rows of {max(self.tokens)} tokens, and it cannot be told which"
            )

    def show(
        self, ffn: int, act_RF: Tensor, token_R: Tensor, added: Callable[[], Tensor] | None = None
    ) -> None:
        """Show activations, and what an expert adds: computed only where somebody looks."""
        self.seen.add(ffn)
        self.on_rows(self.position, ffn, act_RF, token_R)
        if self.on_output is not None and added is not None:
            self.on_output(self.position, ffn, added(), token_R)

    def show_dense(self, act: Tensor) -> None:
        act_RF = act.flatten(0, -2)
        self.check_rows(len(act_RF))
        self.show(0, act_RF, torch.arange(len(act_RF)))

    def check_seen(self, *_: Any) -> None:
        if not self.seen:
            raise self.error(
                f"ran without its matrix {self.unit.down}, or used it in a way that cfsp cannot "
                "watch"
            )
        self.seen.clear()

    @contextmanager
    def while_it_runs(self) -> Iterator[None]:
        module, owner = self.module, self.unit.down.rpartition(".")[0]
        # Made by `transformers.integrations.moe.use_experts_implementation`, around a plain loop.
        follows = self.unit.routed and all(hasattr(module, name) for name in _PROTOCOL)
        forward = inspect.unwrap(type(module).forward) if follows else type(module).forward
        with ExitStack() as stack:
            if not self.unit.routed and owner != self.unit.path:
                down = self.block.get_submodule(owner)
                show = down.register_forward_pre_hook(lambda _, args: self.show_dense(args[0]))
                stack.enter_context(show)
            else:
                module.forward = partial(_watch_products, self, partial(forward, module))
                stack.callback(delattr, module, "forward")  # the class's own is back
            if not follows:
                stack.enter_context(module.register_forward_hook(self.check_seen))
            yield


# Matrices that are bare parameters of modules of any kind.


class Products(TorchFunctionMode):
    """Tells of every product whose second operand is a part of one of some weights.

    `on_product` is given the name of the weight, its part, the first operand and the product, which
    it may change.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        on_product: Callable[[str, Tensor, Tensor, Tensor], None],
    ) -> None:
        super().__init__()
        self.weights, self._on_product = dict(weights), on_product

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        product = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _PRODUCTS and len(args) >= 2:
            for name, weight in self.weights.items() if isinstance(args[1], Tensor) else ():
                if is_part(args[1], weight):
                    self._on_product(name, args[1], args[0], product)
        return product


def is_part(part: Tensor, weight: Tensor) -> bool:
    """Return whether a tensor is a view of a part of a weight, or of the whole."""
    # On Metal addresses are those of buffers' handles: of two tensors they tell nothing.
    if part.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return False
    return 0 <= part.data_ptr() - weight.data_ptr() < weight.nbytes


def _watch_products(watch: _Watch, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a unit's module; show what its down matrices are multiplied with, and give."""
    unit, module = watch.unit, watch.module
    if getattr(module, "has_post_expert_norm", False):
        raise watch.error(
            "normalises what each expert gives, so that its channels have no worth of their own"
        )
    weights = {name: watch.block.get_parameter(name) for name in (unit.up, unit.down)}
    # Matrices stored inputs x outputs are multiplied first.
    bias_ED = getattr(module, "down_proj_bias", None) if unit.axes[unit.down].axis == 1 else None
    inputs: dict[int, Tensor] = {}
    everything: list[tuple[Tensor, Tensor]] = []

    def on_product(name: str, part: Tensor, operand: Tensor, product: Tensor) -> None:
        if not unit.routed:
            if name == unit.down:
                watch.show_dense(operand)
        elif part.ndim == 3:
            if name == unit.down:
                everything.append((operand, product))
        else:
            weight = weights[name]
            expert = (part.data_ptr() - weight.data_ptr()) // weight[0].nbytes
            if name == unit.up:
                inputs[expert] = operand
            else:
                row_R, token_R, share_R1 = _routed_rows(watch, expert, inputs.pop(expert), args)

                def added() -> Tensor:
                    given_RD = product[row_R].detach()
                    return (given_RD if bias_ED is None else given_RD + bias_ED[expert]) * share_R1

                watch.show(expert, operand[row_R] * share_R1.to(operand.dtype), token_R, added)

    with Products(weights, on_product):
        output = forward(*args, **kwargs)
    for act_ERF, added_ERD in everything:
        _show_all_experts(watch, act_ERF, added_ERD, output)
    return output


def _routed_rows(
    watch: _Watch, expert: int, input_RD: Tensor, args: tuple[Any, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of an expert by ascending tokens, these, and the router's weights (R x 1)."""
    # The module is called with all tokens, the experts of each and their weights. Both orders in
    # which an expert's tokens may come are tried on what its first matrix is multiplied with.
    if len(args) == 3 and args[1].shape == args[2].shape and not args[1].is_floating_point():
        hidden_RD, expert_RK, weight_RK = args
        hidden_RD = hidden_RD.flatten(0, -2)
        watch.check_rows(len(hidden_RD))
        token_R, slot_R = torch.where(expert_RK == expert)
        by_slot_R = slot_R.argsort(stable=True)
        for order_R in (torch.arange(len(slot_R), device=slot_R.device), by_slot_R):
            # NaN, which differs from itself, is told of the block as a whole, with what to do.
            pair = hidden_RD[token_R[order_R]], input_RD
            if torch.equal(*pair) or torch.equal(*map(torch.nan_to_num, pair)):
                return order_R.argsort(), token_R, weight_RK[token_R, slot_R, None]
    raise watch.error("does not tell which tokens its experts are given and with which weights")


def _show_all_experts(watch: _Watch, act_ERF: Tensor, added_ERD: Tensor, output: Any) -> None:
    """Show the activations of experts that are all given all tokens."""
    # The router's weight has to be in them. It is if tokens of other experts have zeros, or if the
    # module gives the plain sum over experts.
    down_EFD: Tensor = watch.block.get_parameter(watch.unit.down)
    if watch.unit.axes[watch.unit.down].axis == 2:
        down_EFD = down_EFD.transpose(1, 2)
    routed_ER = (act_ERF != 0).any(-1)
    # NaN and infinity are told of the block as a whole, with what to do.
    if bool(routed_ER.all() & output.isfinite().all()):
        sum_RD = torch.einsum("erf,efd->rd", act_ERF.float(), down_EFD.float())
        if output.numel() != sum_RD.numel() or not torch.allclose(
            output.float().view_as(sum_RD), sum_RD, rtol=1e-2, atol=1e-3 * float(sum_RD.abs().max())
        ):
            raise watch.error(
                "gives every token to every expert and weights them in a way that cfsp cannot see"
            )
    if not routed_ER.any():  # all zero, in every expert: that tells nothing of which tokens it had
        routed_ER = torch.ones_like(routed_ER)
    for expert, act_RF in enumerate(act_ERF):
        token_R = routed_ER[expert].nonzero().flatten()
        added = partial(added_ERD[expert].__getitem__, token_R)
        watch.show(expert, act_RF[token_R], token_R, added)

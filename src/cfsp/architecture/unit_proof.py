"""The proof, by execution, that a unit of a small random model can be cut.

    replay       a block that is called again as the decoder called it computes the same
    bites        with half of the channels masked, the block computes something else
    cut          with the same channels cut out, it computes what it computes with them masked, and
                 so with the other half
    untouched    cutting replaces the parameters of the unit and no other
    neighbours   the blocks before and after compute what they did
    watched      its activations are seen while the block runs, and of which token each is
    whole        of attention: the whole decoder computes with the groups cut out what it computes
                 with them masked, so that no other block reads its keys and values

Masked is a channel whose columns of down are zero, which is the same as zeros at its input. The
channels of an attention are its KV groups.

Shapes: B windows, T tokens, D hidden, F channels, E experts, K kept channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.activations import observed_activations
from cfsp.architecture.found import Fusion, Refusal, Unit
from cfsp.architecture.resizing import resize_attention, resize_ffn
from cfsp.architecture.small_run import (
    LEAST_EFFECT,
    TOLERANCE,
    SmallRun,
    difference,
    fails,
    replaced,
    set_parameter,
)
from cfsp.errors import UnsupportedModelError
from cfsp.settings import Part


def prove_unit(run: SmallRun, unit: Unit, part: Part) -> Unit | Refusal:
    """Return the unit with its fusion settled, or which check it failed."""
    module = run.architecture.module_name(unit)
    if unit.part == "kv" and unit.width == 1 and part == "kv":
        return Refusal(module, "heads: expected two KV groups or more, found one")
    call = run.calls[unit.block]
    if not (error := difference(run.output(unit.block), call.output)) <= TOLERANCE:
        return Refusal(
            module, f"replay: expected the same output again, found a difference of {error:.1e}"
        )
    if unit.part == "kv" and unit.width == 1:
        # Nothing of it can go but all, which `cfsp.streaming.block_proof` proves.
        reason = _watching_fails(run, unit)
        return _as_entered(run, unit.whole()) if reason is None else Refusal(module, reason)
    # Each half of the channels in its turn: one channel may act on all others, as the largest does
    # where activations are quantised.
    halves = [(kept_EK, _masked_output(run, unit, kept_EK)) for kept_EK in _random_halves(unit)]
    kept_EK, masked = halves[0]
    if not (effect := difference(masked, call.output)) > LEAST_EFFECT:
        return Refusal(
            module,
            f"bites: expected another output with half of the channels masked, found a difference "
            f"of {effect:.1e}",
        )
    verdict: Unit | Refusal = unit
    for candidate in _candidates(unit):
        failures = (_cut_fails(run, candidate, *half) for half in halves)
        reason = next((reason for reason in failures if reason is not None), None)
        if reason is None:
            reason = _watching_fails(run, candidate) or _elsewhere_fails(run, candidate, kept_EK)
            if reason is not None:
                return Refusal(module, reason)
            return _as_entered(run, candidate)
        verdict = Refusal(module, reason)
    return verdict


def _watching_fails(run: SmallRun, unit: Unit) -> str | None:
    """Return why the activations of a unit cannot be gathered; None if they can."""
    block = run.blocks[unit.block]
    try:
        with observed_activations(block, [unit], lambda *rows: None):
            run.output(unit.block)
    except UnsupportedModelError as error:
        return f"watched: expected to see its activations, found that {error}"
    return None


def _elsewhere_fails(run: SmallRun, unit: Unit, kept_EK: list[list[int]]) -> str | None:
    """Return why another block depends on an attention's keys and values; None if none does."""
    if unit.part != "kv":
        return None
    masked = _masked_output(run, unit, kept_EK, run.decoder_output)
    with _cut(run.blocks[unit.block], unit, kept_EK):
        expected = "the decoder's output with masked groups"
        return fails("whole", expected, run.decoder_output, masked)


def _as_entered(run: SmallRun, unit: Unit) -> Unit:
    """Return an attention with what it returns, and the module that is entered after it.

    With an output matrix of zeros nothing is added to the hidden state, so that it enters that
    module as it entered the block.
    """
    if unit.part != "kv":
        return unit
    block = run.blocks[unit.block]
    bias = f"{unit.down.removesuffix('weight')}bias"
    zeros = {
        name: torch.zeros_like(parameter)
        for name, parameter in block.named_parameters()
        if name in (unit.down, bias)
    }
    hidden = run.calls[unit.block].hidden
    found: list[str] = []
    ran: list[Any] = []

    def before(path: str, _module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if ran and inputs and inputs[0].shape == hidden.shape and torch.equal(inputs[0], hidden):
            found.append(path)

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        ran.append(output)

    with ExitStack() as stack, replaced(block, zeros):
        attention = block.get_submodule(unit.path)
        stack.callback(attention.register_forward_hook(after).remove)
        for path, module in block.named_modules():
            if path and not f"{path}.".startswith(f"{unit.path}."):
                entered = partial(before, path)
                hook = module.register_forward_pre_hook(entered, with_kwargs=True)
                stack.callback(hook.remove)
        run.output(unit.block)
    extras = len(ran[0]) - 1 if isinstance(ran[0], tuple | list) else None
    return replace(unit, after=found[0] if found else None, extras=extras)


def _candidates(unit: Unit) -> Iterator[Unit]:
    yield unit
    if unit.part == "kv":
        if unit.is_fused:
            yield unit.in_one_section()
    elif unit.is_fused:
        other: Fusion = "interleaved" if unit.axes[unit.up].fusion == "halves" else "halves"
        yield unit.with_fusion(other)


def _random_halves(unit: Unit) -> list[list[list[int]]]:
    """Return channels to keep of each FFN and all others, in ascending order (2 x E lists of K)."""
    generator = torch.Generator().manual_seed(unit.width)
    half = max(1, unit.width // 2)
    order_EF = [torch.randperm(unit.width, generator=generator) for _ in range(unit.ffns)]
    return [
        [order_F[part].sort().values.tolist() for order_F in order_EF]
        for part in (slice(half), slice(half, None))
    ]


def _masked_output(
    run: SmallRun,
    unit: Unit,
    kept_EK: list[list[int]],
    compute: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Return the block's output with zeros in the columns of down that are not kept.

    Args:
        run: the small model.
        unit: one of its units.
        kept_EK: channels of each FFN.
        compute: gives what to return instead.
    """
    block = run.blocks[unit.block]
    down = block.get_parameter(unit.down)
    axis = unit.axes[unit.down].axis
    masked = torch.zeros_like(down)
    # A single matrix has no axis of experts.
    lead = down.ndim - 2
    for ffn, kept in enumerate(kept_EK):
        new, old = (masked[ffn], down[ffn]) if lead else (masked, down)
        index = torch.tensor(unit.columns_of(kept))
        new.index_copy_(axis - lead, index, old.index_select(axis - lead, index))
    with replaced(block, {unit.down: masked}):
        return run.output(unit.block) if compute is None else compute()


def _cut_fails(run: SmallRun, unit: Unit, kept_EK: list[list[int]], masked: Tensor) -> str | None:
    """Return which check a unit fails when it is cut, what was expected and what found."""
    before = _tensors(run.model)
    with _cut(run.blocks[unit.block], unit, kept_EK):
        after = _tensors(run.model)
        prefix = run.architecture.block_prefix(unit.block)
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        if changed != {prefix + name for name in unit.axes}:
            odd = sorted(changed ^ {prefix + name for name in unit.axes})
            return f"untouched: expected that only its own parameters change, found {odd[0]}"
        output = partial(run.output, unit.block)
        reason = fails("cut", "the output with masked channels", output, masked)
        for neighbour in (unit.block - 1, unit.block + 1):
            if reason is None and 0 <= neighbour < len(run.blocks):
                expected = f"the same output of block {neighbour}"
                output = partial(run.output, neighbour)
                reason = fails("neighbours", expected, output, run.calls[neighbour].output)
        return reason


def _tensors(model: nn.Module) -> dict[str, int]:
    """Return which tensor stands under every name."""
    return {
        name: id(tensor)
        for named in (model.named_parameters, model.named_buffers)
        for name, tensor in named(remove_duplicate=False)
    }


@contextmanager
def _cut(block: nn.Module, unit: Unit, kept_EK: list[list[int]]) -> Iterator[None]:
    """Cut all but the kept channels of a unit out of its block; put them back afterwards."""
    originals = {name: block.get_parameter(name) for name in unit.axes}
    module: Any = block.get_submodule(unit.path)
    config = getattr(module, "config", None)
    _resize(block, unit, len(kept_EK[0]))
    try:
        for name, original in originals.items():
            block.get_parameter(name).copy_(unit.select(name, original, kept_EK))
        yield
    finally:
        _resize(block, unit, unit.width)
        if unit.config_numbers:
            module.config = config
        for name, original in originals.items():
            set_parameter(block, name, original)


def _resize(block: nn.Module, unit: Unit, width: int) -> None:
    """Give a unit another width."""
    if unit.part == "kv":
        numbers = dict(unit.config_numbers)
        axes, attributes = unit.plain_axes, unit.plain_attributes
        resize_attention(block, unit.path, width, axes, attributes, numbers)
    else:
        resize_ffn(block, width, unit.plain_axes, unit.plain_attributes)

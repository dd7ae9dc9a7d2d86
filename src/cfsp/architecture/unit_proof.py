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

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cfsp.architecture.activations import observed_activations
from cfsp.architecture.found import Unit
from cfsp.architecture.small_run import (
    FailedCheckError,
    SmallRun,
    check_bites,
    check_same,
    replaced,
    set_parameter,
)
from cfsp.errors import UnsupportedModelError
from cfsp.settings import Part


def prove_unit(run: SmallRun, unit: Unit, part: Part) -> Unit:
    """Return the unit with its fusion settled, or raise FailedCheckError: it can't be cut."""
    if unit.part == "kv" and unit.width == 1 and part == "kv":
        raise FailedCheckError("heads: expected two KV groups or more, found one")
    dense = run.calls[unit.block].output
    check_same("replay", "the same output again", partial(run.output, unit.block), dense)
    if unit.part == "kv" and unit.width == 1:
        # Nothing of it can go but all, which `cfsp.streaming.block_proof` proves.
        _check_is_watched(run, unit)
        return _as_entered(run, unit.whole())
    # Each half of the channels in its turn: one channel may act on all others, as the largest does
    # where activations are quantised.
    halves: list[tuple[list[list[int]], Tensor]] = []
    for kept_EK in _random_halves(unit):
        with _masked(run, unit, kept_EK):
            halves.append((kept_EK, run.output(unit.block)))
    check_bites("with half of the channels masked", halves[0][1], dense)
    try:
        _check_cut(run, unit, halves)
    except FailedCheckError:
        other = unit.other_fusion()
        if other is None:
            raise
        unit = other
        _check_cut(run, unit, halves)
    _check_is_watched(run, unit)
    if unit.part == "ffn":
        return unit
    # No other block may depend on its keys and values.
    kept_EK = halves[0][0]
    with _masked(run, unit, kept_EK):
        masked = run.decoder_output()
    with _cut(run.blocks[unit.block], unit, kept_EK):
        check_same("whole", "the decoder's output with masked groups", run.decoder_output, masked)
    return _as_entered(run, unit)


def _check_is_watched(run: SmallRun, unit: Unit) -> None:
    try:
        with observed_activations(run.blocks[unit.block], [unit], lambda *rows: None):
            run.output(unit.block)
    except UnsupportedModelError as error:
        raise FailedCheckError(
            f"watched: expected to see its activations, found that {error}"
        ) from error


def _as_entered(run: SmallRun, unit: Unit) -> Unit:
    """Return an attention with what it returns, and the module that is entered after it."""
    # With an output matrix of zeros nothing is added to the hidden state, so that it enters that
    # module as it entered the block.
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


def _random_halves(unit: Unit) -> list[list[list[int]]]:
    """Return channels to keep of each FFN and all others, in ascending order (2 x E lists of K)."""
    generator = torch.Generator().manual_seed(unit.width)
    half = max(1, unit.width // 2)
    order_EF = [torch.randperm(unit.width, generator=generator) for _ in range(unit.ffns)]
    return [
        [order_F[part].sort().values.tolist() for order_F in order_EF]
        for part in (slice(half), slice(half, None))
    ]


@contextmanager
def _masked(run: SmallRun, unit: Unit, kept_EK: list[list[int]]) -> Iterator[None]:
    """Let the columns of down that are not kept be zeros for a while."""
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
        yield


def _check_cut(run: SmallRun, unit: Unit, halves: list[tuple[list[list[int]], Tensor]]) -> None:
    """Check that a unit can be cut: to each half of its channels, with the output of the masked."""
    own = {run.architecture.block_prefix(unit.block) + name for name in unit.axes}
    before = _tensors(run.model)
    for kept_EK, masked in halves:
        with _cut(run.blocks[unit.block], unit, kept_EK):
            after = _tensors(run.model)
            changed = {name for name in before | after if before.get(name) != after.get(name)}
            if changed != own:
                odd = sorted(changed ^ own)[0]
                raise FailedCheckError(
                    f"untouched: expected that only its own parameters change, found {odd}"
                )
            output = partial(run.output, unit.block)
            check_same("cut", "the output with masked channels", output, masked)
            for neighbour in (unit.block - 1, unit.block + 1):
                if 0 <= neighbour < len(run.blocks):
                    expected = f"the same output of block {neighbour}"
                    output, same = partial(run.output, neighbour), run.calls[neighbour].output
                    check_same("neighbours", expected, output, same)


def _tensors(model: nn.Module) -> dict[str, int]:
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
    unit.resize(block, len(kept_EK[0]))
    try:
        for name, original in originals.items():
            block.get_parameter(name).copy_(unit.select(name, original, kept_EK))
        yield
    finally:
        unit.resize(block, unit.width)
        if unit.config_numbers:
            module.config = config
        for name, original in originals.items():
            set_parameter(block, name, original)

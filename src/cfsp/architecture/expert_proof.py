"""Whole experts as something that can go: what has their axis, and the proof by execution.

The axis is found by building the stock model with another number of experts: the key of the config
that says it is the one that does that, and every tensor that becomes shorter has the axis. Where
the router chooses the best groups of experts first, equally many of each must stay; how many groups
there are is found by trying. The proof, on a small random model:

    outputs    what its experts add, as it is seen while a block runs, is what the block's experts
               give together
    runs       a model that is built with fewer experts gives numbers
    bites      with half of the experts masked, the model computes something else
    cut        a model that is built without them computes what the whole one computes with them
               masked

Masked is an expert that the router never chooses: its logit is minus infinity, and what else the
choice looks at is hardly more.

Shapes: E experts, R rows, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from cfsp.architecture.activations import Products, is_part, observed_activations
from cfsp.architecture.found import Architecture, RoutedExperts, Unit
from cfsp.architecture.model_classes import empty_stock_model, with_values
from cfsp.architecture.small_run import (
    TOKENS,
    WINDOWS,
    FailedCheckError,
    SmallRun,
    check_bites,
    check_same,
    checking,
    first_tensor,
    rebuilt,
)
from cfsp.errors import UnsupportedModelError

# Below whatever a choice looks at. Infinity times a weight of zero would be NaN.
_NEVER = -1e9
# What may give a weight in another dtype: many routers compute in float32 whatever theirs is.
_CASTS = frozenset({"to", "type", "float", "double"})


def _check_outputs(run: SmallRun, unit: Unit) -> None:
    """Check that it is seen what the experts of a unit add."""
    block = run.blocks[unit.block]
    given: list[Tensor] = []
    parts: list[tuple[Tensor, Tensor]] = []
    # The number of channels of the small model is another one.
    place = unit.block, unit.path
    small = next(each for each in run.architecture.units if (each.block, each.path) == place)
    module = block.get_submodule(unit.path)
    with checking("outputs", "to see what its experts add"):
        with (
            module.register_forward_hook(lambda _m, _a, out: given.append(first_tensor(out))),
            observed_activations(
                block, [small], lambda *_: None, lambda _u, _e, *added: parts.append(added)
            ),
        ):
            run.output(unit.block)
        # Some give what each expert adds to every token, one expert after the other.
        expected_RD = given[0].reshape(-1, WINDOWS * TOKENS, given[0].shape[-1]).sum(0)
        found_RD = torch.zeros_like(expected_RD)
        for added_RD, token_R in parts:
            found_RD.index_add_(0, token_R, added_RD)
    expected = "that what its experts add is what they give together"
    check_same("outputs", expected, lambda: found_RD, expected_RD)


def _staying_experts(experts: RoutedExperts, kept: int, *, at_random: bool = False) -> list[int]:
    """Return as many experts of each group, ascending: random ones, or the last."""
    # Without the first ones most groups go whole, where groups matter.
    size, each = experts.count // experts.groups, kept // experts.groups
    generator, staying = torch.Generator().manual_seed(kept), []
    for first in range(0, experts.count, size):
        order = torch.randperm(size, generator=generator) if at_random else range(size)[::-1]
        staying += [first + int(expert) for expert in order[:each]]
    return sorted(staying)


@torch.no_grad()
def failure_with(architecture: Architecture, run: SmallRun, count: int) -> FailedCheckError | None:
    """Return why the model does not run with so many experts in every block; None if it does."""
    assert architecture.experts is not None
    blocks = [unit.block for unit in architecture.units if unit.expert_axes]
    kept = dict.fromkeys(blocks, _staying_experts(architecture.experts, count))
    try:
        with checking("runs", f"that it runs with {count} experts"):
            output = _cut(architecture, run, kept).decoder_output()
    except FailedCheckError as failure:
        return failure
    if bool(torch.isfinite(output).all()):
        return None
    return FailedCheckError(f"runs: expected numbers with {count} experts, found NaN")


@torch.no_grad()
def check_experts(
    architecture: Architecture, run: SmallRun, kept: Mapping[int, Sequence[int]]
) -> None:
    """Check that the model computes the same with experts cut as with them masked.

    `kept` names those of each block that stay, equally many everywhere and in every group. Every
    block must, from the input of the run, and the decoder.
    """
    expected = "the output with masked experts"
    with _filled_buffers(architecture, run):
        with ExitStack() as stack:
            for unit in architecture.units:
                if unit.block in kept and unit.expert_axes:
                    block = run.blocks[unit.block]
                    stack.enter_context(masked_experts(block, unit, kept[unit.block]))
            masked = run.decoder_output()
            masked_of = {block: run.output(block) for block in kept}
        check_bites("with experts masked", run.decoder_output(), masked)
        with checking("cut", expected):
            cut = _cut(architecture, run, kept)
        for number, wanted in masked_of.items():
            check_same("cut", f"{expected} in block {number}", partial(cut.output, number), wanted)
        check_same("cut", f"{expected} after all blocks", cut.decoder_output, masked)


class _RouterProducts(Products):
    """Tells of products with casts of the weights as well."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in _CASTS:
            for name, weight in dict(self.weights).items():
                if args[0].shape == weight.shape and is_part(args[0], weight):
                    self.weights[f"{name} as {result.dtype}"] = result
        return result


@contextmanager
def masked_experts(block: nn.Module, unit: Unit, kept: Sequence[int]) -> Iterator[None]:
    """Let the router of a block choose among some experts only."""
    gone = [expert for expert in range(unit.ffns) if expert not in set(kept)]
    tensors = block.state_dict(keep_vars=True)
    of_experts = [tensors[name].detach() for name in unit.expert_axes]
    single = [tensor for tensor in of_experts if tensor.numel() == unit.ffns]
    matrices = {str(i): t for i, t in enumerate(of_experts) if t.numel() > unit.ffns}

    def unchosen(_name: str, _part: Tensor, _operand: Tensor, product: Tensor) -> None:
        product[..., gone] = float("-inf")

    running = ExitStack()

    def before(*_: Any) -> None:
        for tensor in single:
            running.callback(tensor.copy_, tensor.clone())
            tensor.view(-1)[gone] = _NEVER
        # One for each run: it holds casts while it lasts.
        running.enter_context(_RouterProducts(matrices, unchosen))

    def after(*_: Any) -> None:
        running.close()

    # Other blocks may have the same tensors, and lose other experts.
    with (
        block.register_forward_pre_hook(before),
        block.register_forward_hook(after, always_call=True),
    ):
        yield


@contextmanager
def _filled_buffers(architecture: Architecture, run: SmallRun) -> Iterator[None]:
    """Give buffers with the axis of experts values for a while: zeros would hide an error."""
    generator = torch.Generator().manual_seed(2)
    with ExitStack() as stack:
        for unit in architecture.units:
            for name, buffer in run.blocks[unit.block].named_buffers():
                if name in unit.expert_axes and buffer.is_floating_point():
                    stack.callback(buffer.copy_, buffer.clone())
                    buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        yield


def _cut(architecture: Architecture, run: SmallRun, kept: Mapping[int, Sequence[int]]) -> SmallRun:
    """Return the run of the small model, built with fewer experts and the others' weights."""
    assert architecture.experts is not None
    count = len(next(iter(kept.values())))
    axes = {
        architecture.block_prefix(unit.block) + name: (unit.block, axis)
        for unit in architecture.units
        if unit.expert_axes
        for name, axis in {**dict.fromkeys(unit.axes, 0), **unit.expert_axes}.items()
    }
    # Blocks that are built alike have the same tensors, and mostly the same experts stay.
    selected: dict[object, Tensor] = {}

    def place_of(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        is_parameter = isinstance(tensor, nn.Parameter)
        if name not in axes:
            return (name, tensor) if is_parameter else None
        block, axis = axes[name]
        key = (id(tensor), tuple(kept[block]))
        if key not in selected:
            fewer = tensor.index_select(axis, torch.tensor(kept[block]))
            selected[key] = nn.Parameter(fewer, False) if is_parameter else fewer
        return name, selected[key]

    config: Any = run.model.config
    return rebuilt(run, with_values(config, {architecture.experts.key: count}), place_of)


def with_experts(
    architecture: Architecture, config: PreTrainedConfig, run: SmallRun
) -> Architecture:
    """Return the architecture of a stock model with what has the axis of experts, proved."""
    routed = [unit for unit in architecture.units if unit.routed]
    if not routed:
        raise _refused(architecture, "it has no routed experts whose matrices cfsp could find")
    if routed[0].ffns == 1:
        raise _refused(architecture, "its blocks have one routed expert, which stays")
    key, axes_of = _find_axes(architecture, config, routed)
    units = tuple(
        replace(unit, expert_axes=axes_of[unit.block]) if unit.routed else unit
        for unit in architecture.units
    )
    experts = RoutedExperts(key, routed[0].ffns)
    architecture = replace(architecture, units=units, experts=experts)
    examples = {unit.kind: unit for unit in reversed(units) if unit.expert_axes}
    for unit in examples.values():
        with refusing_experts(architecture, architecture.module_name(unit)):
            _check_outputs(run, unit)
    with refusing_experts(architecture):
        groups = _find_groups(architecture, config, run)
    return replace(architecture, experts=replace(experts, groups=groups))


@contextmanager
def refusing_experts(architecture: Architecture, what: str = "they") -> Iterator[None]:
    """Say that whole experts of a model can't go where a check fails."""
    try:
        yield
    except FailedCheckError as failure:
        raise _refused(architecture, f"{what} failed the check {failure}") from failure


def _refused(architecture: Architecture, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"whole experts of {architecture.class_name} can't be removed: {reason}; prune it without "
        "the part experts"
    )


def _find_axes(
    architecture: Architecture, config: PreTrainedConfig, routed: Sequence[Unit]
) -> tuple[str, dict[int, dict[str, int]]]:
    """Return the key that says how many experts there are, and what has their axis, by block."""
    count = routed[0].ffns
    fields = config.get_text_config(decoder=True).to_dict()
    before, fewer = _shapes(config), count // 2
    matrices = [
        architecture.block_prefix(unit.block) + name for unit in routed for name in unit.axes
    ]
    for key in (key for key, value in fields.items() if value == count and type(value) is int):
        try:
            changed = with_values(config, {key: fewer})
            after = _shapes(type(config).from_dict(changed.to_dict()))
        except Exception:  # whatever a config or class does with a number that it does not expect
            continue
        if before.keys() == after.keys() and all(
            _axis_between(before[name], after[name], count, fewer) == 0 for name in matrices
        ):
            break
    else:
        raise _refused(
            architecture, f"no key of its config says alone that there are {count} experts"
        )
    unit_of = {architecture.block_prefix(unit.block): unit for unit in routed}
    axes: dict[int, dict[str, int]] = {unit.block: {} for unit in routed}
    for name in (name for name in before if before[name] != after[name]):
        prefix = next((prefix for prefix in unit_of if name.startswith(prefix)), None)
        axis = _axis_between(before[name], after[name], count, fewer)
        own = prefix is not None and name.removeprefix(prefix) in unit_of[prefix].axes
        if prefix is None or axis is None or (not own and len(before[name]) > 2):
            raise _refused(
                architecture,
                f"{name} of shape {list(before[name])} would have the shape {list(after[name])} "
                f"with {fewer} experts, and cfsp cannot tell what it is",
            )
        if not own:
            axes[unit_of[prefix].block][name.removeprefix(prefix)] = axis
    return key, axes


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    tensors = empty_stock_model(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _axis_between(
    before: tuple[int, ...], after: tuple[int, ...], count: int, fewer: int
) -> int | None:
    """Return the only axis that has become shorter, from `count` to `fewer`; None if it is none."""
    for axis, length in enumerate(before):
        if length == count and after == (*before[:axis], fewer, *before[axis + 1 :]):
            return axis
    return None


def _find_groups(architecture: Architecture, config: PreTrainedConfig, run: SmallRun) -> int:
    """Return how many groups keep equally many experts."""
    assert architecture.experts is not None
    count = architecture.experts.count
    first: FailedCheckError | None = None
    blocks = [unit.block for unit in architecture.units if unit.expert_axes]
    fields = config.get_text_config(decoder=True).to_dict()
    numbers = {
        value
        for name, value in fields.items()
        if "group" in name and type(value) is int and 1 < value < count and count % value == 0
    }
    for groups in (1, *sorted(numbers)):
        experts = replace(architecture.experts, groups=groups)
        tried = replace(architecture, experts=experts)
        near = counts_near(count // 2, experts)
        kept = next((fewer for fewer in near if not failure_with(tried, run, fewer)), None)
        if kept is None:
            first = first or failure_with(tried, run, count - groups)
            continue
        try:
            for at_random in (False, True):
                staying = _staying_experts(experts, kept, at_random=at_random)
                check_experts(tried, run, dict.fromkeys(blocks, staying))
            return groups
        except FailedCheckError as failure:
            first = first or failure
    raise first or FailedCheckError(f"runs: expected fewer than {count} experts, found none")


def counts_near(wanted: int, experts: RoutedExperts) -> list[int]:
    """Return the numbers of experts that may stay, those near one first and more before fewer."""
    counts = range(experts.groups, experts.count, experts.groups)
    return sorted(counts, key=lambda count: (abs(count - wanted), -count))

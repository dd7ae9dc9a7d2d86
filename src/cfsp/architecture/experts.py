"""Whole experts as something that can go: what has their axis, and the proof that they can.

What has the axis of experts is found by building the stock model with another number of them: the
key of the config that says it is the one that does that, and every tensor that becomes shorter has
the axis. A small random model then proves that experts can go:

    outputs    what its experts add, as it is seen while a block runs, is what the block's experts
               give together
    bites      with half of the experts masked, the model computes something else
    cut        a model that is built without them computes what the whole one computes with them
               masked

Masked is an expert that the router never chooses: its logit is minus infinity, and what else the
choice looks at is hardly more. Some routers choose the best groups of experts first. Then equally
many of each group must stay, and the proof finds how many groups there are.

Shapes: E experts, R rows, D hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cfsp.architecture.activations import PRODUCTS, is_part, observed_activations
from cfsp.architecture.found import Architecture, RoutedExperts, Unit
from cfsp.architecture.small_run import (
    LEAST_EFFECT,
    TOLERANCE,
    SmallRun,
    difference,
    first_tensor,
    set_parameter,
    small_skeleton,
)
from cfsp.errors import UnsupportedModelError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Below whatever a choice looks at. Infinity times a weight of zero would be NaN.
_NEVER = -1e9


def config_with_experts(config: PreTrainedConfig, key: str, count: int) -> PreTrainedConfig:
    """Return a config that says another number of routed experts.

    Args:
        config: stays as it is.
        key: of the text config.
        count: the new number.
    """
    changed = copy.deepcopy(config)
    setattr(changed.get_text_config(decoder=True), key, count)
    return changed


def with_experts(
    architecture: Architecture, config: PreTrainedConfig, run: SmallRun
) -> Architecture:
    """Return the architecture with what has the axis of experts, proved.

    Args:
        architecture: with the FFN units that are proved.
        config: of the stock model.
        run: of a small one.

    Raises:
        UnsupportedModelError: it has no routed experts, or whole ones can't go.
    """
    routed = [unit for unit in architecture.units if unit.routed]
    if not routed:
        raise refused_experts(
            architecture, "it has no routed experts whose matrices cfsp could find"
        )
    counts = {unit.ffns for unit in routed}
    if len(counts) > 1:
        raise refused_experts(
            architecture, f"its blocks have {sorted(counts)} experts, expected as many"
        )
    key, axes_of = _find_axes(architecture, config, type(run.model), routed)
    units = tuple(
        replace(unit, expert_axes=axes_of[unit.block]) if unit.routed else unit
        for unit in architecture.units
    )
    experts = RoutedExperts(key, routed[0].ffns)
    architecture = replace(architecture, units=units, experts=experts)
    for unit in _examples(architecture):
        if reason := _outputs_fail(run, unit):
            raise refused_experts(architecture, f"{architecture.module_name(unit)} failed {reason}")
    groups, reason = _find_groups(architecture, config, run)
    if not groups:
        raise refused_experts(architecture, f"they failed {reason}")
    return replace(architecture, experts=replace(experts, groups=groups))


def refused_experts(architecture: Architecture, reason: str) -> UnsupportedModelError:
    """Return the error that whole experts of a model can't go."""
    return UnsupportedModelError(
        f"whole experts of {architecture.class_name} can't be removed: {reason}; prune it without "
        "the part experts"
    )


def _find_axes(
    architecture: Architecture, config: PreTrainedConfig, model_class: Any, routed: Sequence[Unit]
) -> tuple[str, dict[int, dict[str, int]]]:
    """Return the key that says how many experts there are, and what has their axis, by block.

    Raises:
        UnsupportedModelError: none does, or something beside one unit in each block has experts.
    """
    count = routed[0].ffns
    fields = config.get_text_config(decoder=True).to_dict()
    before, fewer = _shapes(config, model_class), count // 2
    matrices = [
        architecture.block_prefix(unit.block) + name for unit in routed for name in unit.axes
    ]
    for key in (key for key, value in fields.items() if value == count and type(value) is int):
        try:
            changed = config_with_experts(config, key, fewer)
            after = _shapes(type(config).from_dict(changed.to_dict()), model_class)
        except Exception:  # whatever a config or class does with a number that it does not expect
            continue
        if before.keys() == after.keys() and all(
            _axis_between(before[name], after[name], count, fewer) == 0 for name in matrices
        ):
            break
    else:
        raise refused_experts(
            architecture, f"no key of its config says alone that there are {count} experts"
        )
    unit_of = {architecture.block_prefix(unit.block): unit for unit in routed}
    if len(unit_of) < len(routed):
        raise refused_experts(
            architecture, "a block has several routers, and its config one number"
        )
    axes: dict[int, dict[str, int]] = {unit.block: {} for unit in routed}
    for name in (name for name in before if before[name] != after[name]):
        prefix = next((prefix for prefix in unit_of if name.startswith(prefix)), None)
        axis = _axis_between(before[name], after[name], count, fewer)
        own = prefix is not None and name.removeprefix(prefix) in unit_of[prefix].axes
        if prefix is None or axis is None or (not own and len(before[name]) > 2):
            raise refused_experts(
                architecture,
                f"{name} of shape {list(before[name])} would have the shape {list(after[name])} "
                f"with {fewer} experts, and cfsp cannot tell what it is",
            )
        if not own:
            axes[unit_of[prefix].block][name.removeprefix(prefix)] = axis
    return key, axes


def _shapes(config: PreTrainedConfig, model_class: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters and stored buffers that a config builds, by name."""
    with torch.device("meta"):
        model: PreTrainedModel = model_class._from_config(copy.deepcopy(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _axis_between(
    before: Sequence[int], after: Sequence[int], count: int, fewer: int
) -> int | None:
    """Return the only axis that has become shorter, from `count` to `fewer`; None if it is none."""
    axes = [
        axis for axis, pair in enumerate(zip(before, after, strict=False)) if len(set(pair)) > 1
    ]
    if len(before) != len(after) or len(axes) != 1:
        return None
    return axes[0] if (before[axes[0]], after[axes[0]]) == (count, fewer) else None


def _examples(architecture: Architecture) -> Iterator[Unit]:
    """Yield a unit with experts of every kind."""
    seen = set()
    for unit in architecture.units:
        if unit.expert_axes and unit.kind not in seen:
            seen.add(unit.kind)
            yield unit


def _outputs_fail(run: SmallRun, unit: Unit) -> str | None:
    """Return why it is not seen what the experts of a unit add; None if it is."""
    block = run.blocks[unit.block]
    given: list[Tensor] = []
    parts: list[tuple[Tensor, Tensor]] = []
    module = block.get_submodule(unit.path)
    hook = module.register_forward_hook(lambda _m, _a, output: given.append(first_tensor(output)))
    # The number of channels of the small model is another one.
    small = next(
        each
        for each in run.architecture.units
        if (each.block, each.path) == (unit.block, unit.path)
    )
    try:
        with observed_activations(
            block,
            [small],
            lambda *_: None,
            lambda _unit, _expert, added_RD, token_R: parts.append((added_RD, token_R)),
        ):
            run.output(unit.block)
    except UnsupportedModelError as error:
        return f"the check outputs: expected to see what its experts add, found that {error}"
    finally:
        hook.remove()
    # Some give what each expert adds to every token, one expert after the other.
    rows, hidden = run.calls[unit.block].hidden.flatten(0, -2).shape
    expected_RD = given[0].reshape(-1, rows, hidden).sum(0)
    found_RD = torch.zeros_like(expected_RD)
    for added_RD, token_R in parts:
        found_RD.index_add_(0, token_R, added_RD)
    if not (error_found := difference(found_RD, expected_RD)) <= TOLERANCE:
        return (
            "the check outputs: expected that what its experts add is what they give together, "
            f"found a relative difference of {error_found:.1e}"
        )
    return None


def _find_groups(
    architecture: Architecture, config: PreTrainedConfig, run: SmallRun
) -> tuple[int, str]:
    """Return how many groups keep equally many experts, or 0 and why experts can't go."""
    assert architecture.experts is not None
    count, first = architecture.experts.count, ""
    for groups in (1, *_group_numbers(config, count)):
        experts = replace(architecture.experts, groups=groups)
        tried = replace(architecture, experts=experts)
        kept = next(
            (
                fewer
                for fewer in counts_near(count // 2, experts)
                if why_not(tried, run, fewer) is None
            ),
            None,
        )
        if kept is None:
            reason = f"the check runs: {why_not(tried, run, count - groups)}"
        else:
            chosen = [_last_of_groups(tried, kept), _random_of_groups(tried, kept)]
            blocks = [unit.block for unit in tried.units if unit.expert_axes]
            found = (experts_fail(tried, run, dict.fromkeys(blocks, staying)) for staying in chosen)
            reason = next((each for each in found if each is not None), "")
        if not reason:
            return groups, ""
        first = first or reason
    return 0, first


def _group_numbers(config: PreTrainedConfig, count: int) -> list[int]:
    """Return numbers that may be of groups of experts, ascending."""
    fields = config.get_text_config(decoder=True).to_dict()
    numbers = {
        value
        for name, value in fields.items()
        if "group" in name and type(value) is int and 1 < value < count and count % value == 0
    }
    return sorted(numbers)


def counts_near(wanted: int, experts: RoutedExperts) -> list[int]:
    """Return the numbers of experts that may stay, those near one first and more before fewer."""
    counts = range(experts.groups, experts.count, experts.groups)
    return sorted(counts, key=lambda count: (abs(count - wanted), -count))


def _last_of_groups(architecture: Architecture, kept: int) -> list[int]:
    """Return the last experts of each group: where groups matter, most of the others go whole."""
    assert architecture.experts is not None
    size = architecture.experts.count // architecture.experts.groups
    of_each = kept // architecture.experts.groups
    return [
        expert for expert in range(architecture.experts.count) if expert % size >= size - of_each
    ]


def _random_of_groups(architecture: Architecture, kept: int) -> list[int]:
    """Return random experts of each group, in ascending order."""
    assert architecture.experts is not None
    groups = architecture.experts.groups
    size, generator = architecture.experts.count // groups, torch.Generator().manual_seed(kept)
    return sorted(
        group * size + expert
        for group in range(groups)
        for expert in torch.randperm(size, generator=generator)[: kept // groups].tolist()
    )


@torch.no_grad()
def why_not(architecture: Architecture, run: SmallRun, count: int) -> str | None:
    """Return why the model does not run with so many experts in every block; None if it does.

    Args:
        architecture: with what has the axis of experts.
        run: of a small model.
        count: how many, a multiple of the number of groups.
    """
    blocks = [unit.block for unit in architecture.units if unit.expert_axes]
    kept = dict.fromkeys(blocks, _last_of_groups(architecture, count))
    try:
        output = _cut(architecture, run, kept).decoder_output()
    except Exception as error:  # whatever a router does with too few experts
        return f"expected that it runs with {count} experts, found {first_line(error)}"
    is_finite = bool(torch.isfinite(output).all())
    return None if is_finite else f"expected numbers with {count} experts, found NaN"


@torch.no_grad()
def experts_fail(
    architecture: Architecture, run: SmallRun, kept: Mapping[int, Sequence[int]]
) -> str | None:
    """Return which check a model fails with some of its experts only; None if it fails none.

    Every block must compute the same with its experts cut as with them masked, from the input of
    the run. The decoder as a whole must too, to the sum of what its blocks may differ by: rounding
    adds up from block to block.

    Args:
        architecture: with what has the axis of experts.
        run: of a small model.
        kept: block -> the experts that stay, equally many everywhere and in every group.
    """
    with _filled_buffers(architecture, run):
        return _cut_fails(architecture, run, kept)


def _cut_fails(
    architecture: Architecture, run: SmallRun, kept: Mapping[int, Sequence[int]]
) -> str | None:
    with ExitStack() as stack:
        for unit in architecture.units:
            if unit.block in kept and unit.expert_axes:
                block = run.blocks[unit.block]
                stack.enter_context(masked_experts(block, unit, kept[unit.block]))
        masked = run.decoder_output()
        masked_of = {block: run.output(block) for block in kept}
    if not (effect := difference(run.decoder_output(), masked)) > LEAST_EFFECT:
        return (
            "the check bites: expected another output with experts masked, found a difference of "
            f"{effect:.1e}"
        )
    try:
        cut = _cut(architecture, run, kept)
        errors = {
            f" in block {block}": difference(cut.output(block), masked_of[block]) for block in kept
        }
        # Of each block in the mean, so that one bound is for all.
        errors[" after all blocks"] = difference(cut.decoder_output(), masked) / len(run.blocks)
    except Exception as problem:  # whatever a router does with fewer experts
        return (
            f"the check cut: expected the output with masked experts, found {first_line(problem)}"
        )
    for where, error in errors.items():
        if not error <= TOLERANCE:
            return (
                "the check cut: expected the output with masked experts, found a relative "
                f"difference of {error:.1e}{where}"
            )
    return None


@contextmanager
def masked_experts(block: nn.Module, unit: Unit, kept: Sequence[int]) -> Iterator[None]:
    """Let the router of a block choose among some of its experts only, whenever the block runs.

    Args:
        block: a decoder block that computes in the dtype of its router.
        unit: the experts.
        kept: those that stay.
    """
    gone = [expert for expert in range(unit.ffns) if expert not in set(kept)]
    tensors = block.state_dict(keep_vars=True)
    of_experts = [tensors[name].detach() for name in unit.expert_axes]
    single = [tensor for tensor in of_experts if tensor.numel() == unit.ffns]
    mode: Any = _Unchosen([tensor for tensor in of_experts if tensor.numel() > unit.ffns], gone)
    saved: list[Tensor] = []

    def before(*_: Any) -> None:
        saved[:] = [tensor.clone() for tensor in single]
        for tensor in single:
            tensor.view(-1)[gone] = _NEVER
        mode.__enter__()

    def after(*_: Any) -> None:
        mode.__exit__(None, None, None)
        for tensor, values in zip(single, saved, strict=True):
            tensor.copy_(values)

    # Other blocks may have the same tensors, and lose other experts.
    hooks = [
        block.register_forward_pre_hook(before),
        block.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Unchosen(TorchFunctionMode):
    """Makes some of the logits that a router's matrix gives minus infinity.

    Args:
        matrices: that may be a router's.
        gone: the experts whose logits they are.
    """

    def __init__(self, matrices: Sequence[Tensor], gone: Sequence[int]) -> None:
        super().__init__()
        self._matrices, self._gone = matrices, gone

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in PRODUCTS and len(args) >= 2:
            operand = args[1]
            if isinstance(operand, Tensor) and any(is_part(operand, m) for m in self._matrices):
                output[..., self._gone] = float("-inf")
        return output


@contextmanager
def _filled_buffers(architecture: Architecture, run: SmallRun) -> Iterator[None]:
    """Give buffers with the axis of experts values for a while: zeros would hide an error."""
    generator = torch.Generator().manual_seed(2)
    originals: list[tuple[Tensor, Tensor]] = []
    for unit in architecture.units:
        buffers = dict(run.blocks[unit.block].named_buffers())
        for name in unit.expert_axes:
            if name in buffers and buffers[name].is_floating_point():
                originals.append((buffers[name], buffers[name].clone()))
                values = torch.randn(buffers[name].shape, generator=generator)
                buffers[name].copy_(0.1 * values)
    try:
        yield
    finally:
        for buffer, original in originals:
            buffer.copy_(original)


def _cut(architecture: Architecture, run: SmallRun, kept: Mapping[int, Sequence[int]]) -> SmallRun:
    """Return the run of the small model, built with fewer experts and the others' weights."""
    assert architecture.experts is not None
    count = len(next(iter(kept.values())))
    config = config_with_experts(run.model.config, architecture.experts.key, count)
    model: Any = small_skeleton(config, type(run.model))
    axes = {
        architecture.block_prefix(unit.block) + name: (unit.block, axis)
        for unit in architecture.units
        if unit.expert_axes
        for name, axis in {**dict.fromkeys(unit.axes, 0), **unit.expert_axes}.items()
    }
    whole: Any = run.model
    # Blocks that are built alike have the same tensors, and mostly the same experts stay.
    selected: dict[object, Tensor] = {}
    for named in (whole.named_parameters, whole.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if tensor.is_meta:
                continue
            if name in axes:
                block, axis = axes[name]
                key = (id(tensor), tuple(kept[block]))
                if key not in selected:
                    fewer = tensor.index_select(axis, torch.tensor(kept[block]))
                    is_parameter = isinstance(tensor, nn.Parameter)
                    selected[key] = (
                        nn.Parameter(fewer, requires_grad=False) if is_parameter else fewer
                    )
                tensor = selected[key]
            elif not isinstance(tensor, nn.Parameter):
                continue
            set_parameter(model, name, tensor)
    return replace(run, model=model, blocks=model.get_submodule(run.architecture.blocks))

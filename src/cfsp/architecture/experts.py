"""Whole experts as something that can go: what has their axis, and the proof that they can.

It is found by building the stock model with another number of them: the key of the config that says
it is the one that does that, and every tensor that becomes shorter has the axis. Where the router
chooses the best groups of experts first, equally many of each must stay; how many is found by
trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from cfsp.architecture.expert_proof import (
    check_experts,
    check_outputs,
    runs_with,
    staying_experts,
    try_with,
)
from cfsp.architecture.found import Architecture, RoutedExperts, Unit
from cfsp.architecture.model_classes import empty_stock_model, with_values
from cfsp.architecture.small_run import FailedCheckError, SmallRun
from cfsp.errors import UnsupportedModelError


def with_experts(
    architecture: Architecture, config: PreTrainedConfig, run: SmallRun
) -> Architecture:
    """Return the architecture of a stock model with what has the axis of experts, proved."""
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
    examples: dict[object, Unit] = {}
    for unit in units:
        if unit.expert_axes:
            examples.setdefault(unit.kind, unit)
    for unit in examples.values():
        try:
            check_outputs(run, unit)
        except FailedCheckError as failure:
            name = architecture.module_name(unit)
            raise refused_experts(architecture, f"{name} failed the check {failure}") from failure
    try:
        groups = _find_groups(architecture, config, run)
    except FailedCheckError as failure:
        raise refused_experts(architecture, f"they failed the check {failure}") from failure
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
    """Return the key that says how many experts there are, and what has their axis, by block."""
    count = routed[0].ffns
    fields = config.get_text_config(decoder=True).to_dict()
    before, fewer = _shapes(config, model_class), count // 2
    matrices = [
        architecture.block_prefix(unit.block) + name for unit in routed for name in unit.axes
    ]
    for key in (key for key, value in fields.items() if value == count and type(value) is int):
        try:
            changed = with_values(config, {key: fewer})
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
    tensors = empty_stock_model(config, model_class).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


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
        kept = next((fewer for fewer in near if runs_with(tried, run, fewer)), None)
        try:
            if kept is None:
                try_with(tried, run, count - groups)
                continue
            for at_random in (False, True):
                staying = staying_experts(experts, kept, at_random=at_random)
                check_experts(tried, run, dict.fromkeys(blocks, staying))
            return groups
        except FailedCheckError as failure:
            first = first or failure
    raise first or FailedCheckError(f"runs: expected fewer than {count} experts, found none")


def counts_near(wanted: int, experts: RoutedExperts) -> list[int]:
    """Return the numbers of experts that may stay, those near one first and more before fewer."""
    counts = range(experts.groups, experts.count, experts.groups)
    return sorted(counts, key=lambda count: (abs(count - wanted), -count))

"""Surgery: obeys a plan, tensor by tensor.

FFN tensors lose rows or columns, and the biases of removed channels. Tensors of removed attentions,
experts and blocks are left out, those of later experts and blocks get other names, and routers lose
rows. Everything else is copied byte for byte.
Tensors stream from the source to the new shards: one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cfsp.checkpoint.pruned_config import pruned_config
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.shards import MAX_SHARD_BYTES, WrittenWeights, write_shards
from cfsp.checkpoint.stored_blocks import names_without_blocks
from cfsp.checkpoint.stored_experts import names_without_experts
from cfsp.checkpoint.tensor_file import (
    OutgoingTensor,
    TensorFile,
    TensorSpec,
    tensor_chunks,
)
from cfsp.planning.plan_file import PruningPlan


def pruned_tensor(source: WeightSource, plan: PruningPlan, name: str) -> Tensor:
    """Return one tensor of the pruned model, in the source's dtype."""
    tensor = source.read(name)
    if name in source.stored.expert_axes:
        unit, axis = source.stored.expert_axes[name]
        return tensor.index_select(axis, torch.tensor(plan.units[unit].kept_ffns).to(tensor.device))
    layout = source.layout_of(name)
    if layout is None:
        return tensor
    entry = plan.units[layout.unit]
    if entry.kept_width == entry.width and not entry.loses_experts:
        return tensor
    pruned = layout.select(tensor, [entry.kept_of(ffn) for ffn in range(entry.ffns)])
    assert layout.width(tensor.shape) == entry.width
    assert layout.width(pruned.shape) == entry.kept_width
    return pruned


def pruned_specs(source: WeightSource, plan: PruningPlan) -> dict[str, TensorSpec]:
    """Return dtype and shape of every tensor of the pruned model, by its name in the source.

    They are in the source's order.
    """
    specs = {}
    staying = _new_names(source, plan)
    for name, spec in source.specs.items():
        if name not in staying:
            continue
        layout = source.layout_of(name)
        if layout is not None:
            unit = plan.units[layout.unit]
            spec = layout.resized(spec, unit.kept_width)
            if unit.loses_experts and layout.ffn is None:
                spec = spec.with_length(0, len(unit.kept_ffns))
        elif name in source.stored.expert_axes:
            index, axis = source.stored.expert_axes[name]
            spec = spec.with_length(axis, len(plan.units[index].kept_ffns))
        specs[name] = spec
    return specs


def _new_names(source: WeightSource, plan: PruningPlan) -> dict[str, str]:
    """Return the names in the pruned model of the stored tensors that stay."""
    names = names_without_blocks(source, plan.removed_blocks)
    gone = {
        name
        for unit, entry in zip(source.units, plan.units, strict=True)
        if not entry.kept
        for name in source.stored.within(f"{source.architecture.module_name(unit)}.")
    }
    names = {name: new for name, new in names.items() if name not in gone}
    return names_without_experts(source, _kept_experts(plan), names)


def _kept_experts(plan: PruningPlan) -> dict[int, list[int]]:
    """Return the experts that stay in every unit that loses some, by its index."""
    return {i: unit.kept_ffns for i, unit in enumerate(plan.units) if unit.loses_experts}


class PrunedSource(WeightSource):
    """A model as surgery would leave it, seen as a weight source; nothing is written.

    Blocks are those that stay, numbered through; stored tensors have the names of the source.

    Args:
        source: the model.
        plan: which channels stay.
        repaired: tensors that repair changed, by name, already in pruned shape.
    """

    def __init__(
        self, source: WeightSource, plan: PruningPlan, repaired: Mapping[str, TensorFile]
    ) -> None:
        removed = plan.removed_blocks
        architecture = source.architecture.without_blocks(removed)
        self.config = pruned_config(
            source.config, source.architecture, removed, plan.kept_widths, plan.kept_experts
        )
        if plan.kept_experts is not None:
            architecture = architecture.with_experts(plan.kept_experts)
        self.architecture = architecture.with_widths(plan.kept_widths)
        gone = [number for number, unit in enumerate(plan.units) if not unit.kept]
        self.label = source.label
        self._source, self._plan, self._repaired = source, plan, repaired
        stored = source.stored.with_experts(_kept_experts(plan))
        if gone or removed:
            stored = stored.without(source.architecture, removed, gone, self.config, self.specs)
        self.stored = stored.of_widths(self.architecture, self.specs)

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, in storage order."""
        return pruned_specs(self._source, self._plan)

    def read(self, name: str) -> Tensor:
        """Return one tensor in its own dtype."""
        if name in self._repaired:
            return self._repaired[name].read(name)
        return pruned_tensor(self._source, self._plan, name)


def write_pruned_weights(
    source: WeightSource,
    plan: PruningPlan,
    directory: Path,
    repaired: Mapping[str, TensorFile] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> WrittenWeights:
    """Write the pruned model's tensors as one or more safetensors files.

    Args:
        source: the model.
        plan: which channels stay; must fit the source.
        directory: an existing directory.
        repaired: tensors that repair changed, by name, already in pruned shape.
        max_shard_bytes: size of a shard; a larger single tensor gets a shard of its own.

    Raises:
        OSError: the disk is full or not writable.
        CheckpointError: the source ended or changed.
    """
    specs, new_names = pruned_specs(source, plan), _new_names(source, plan)
    outgoing = [
        replace(_outgoing(source, plan, name, spec, repaired or {}), name=new_names[name])
        for name, spec in specs.items()
    ]
    return write_shards(directory, outgoing, max_shard_bytes)


def _outgoing(
    source: WeightSource,
    plan: PruningPlan,
    name: str,
    spec: TensorSpec,
    repaired: Mapping[str, TensorFile],
) -> OutgoingTensor:
    if name in repaired:
        assert repaired[name].specs[name] == spec, name
        return OutgoingTensor(name, spec, lambda: repaired[name].chunks(name))
    if spec == source.specs[name]:
        return OutgoingTensor(name, spec, lambda: source.chunks(name))

    def cut() -> Iterator[memoryview]:
        return tensor_chunks(pruned_tensor(source, plan, name))

    return OutgoingTensor(name, spec, cut)

"""Surgery: obeys a plan, parameter by parameter.

The parameters of a unit lose rows or columns, and the biases of removed channels. Those of removed
attentions, experts and blocks are left out, and routers lose rows. What is cut is stored in the
form that the checkpoint has; all else is copied byte for byte. The tensors of later experts and
blocks get other names.
Tensors stream from the source to the new shards: of what is cut, only what shares stored tensors is
in memory at a time, at most the experts of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from cfsp.checkpoint.conversion import meta
from cfsp.checkpoint.pruned_config import pruned_config
from cfsp.checkpoint.reading import WeightSource, channel_parameters
from cfsp.checkpoint.shards import MAX_SHARD_BYTES, WrittenWeights, write_shards
from cfsp.checkpoint.stored_blocks import name_without_blocks, names_without_blocks
from cfsp.checkpoint.stored_tensors import StoredTensors
from cfsp.checkpoint.tensor_file import (
    OutgoingTensor,
    TensorFile,
    TensorSpec,
    specs_of,
    tensor_chunks,
)
from cfsp.planning.plan_file import PruningPlan

T = TypeVar("T")


class Cut:
    """What a plan makes of the parameters of a model, by their names in that model.

    Args:
        source: the model.
        plan: which channels stay.
    """

    def __init__(self, source: WeightSource, plan: PruningPlan) -> None:
        self.source, self.plan = source, plan
        architecture = source.architecture
        self._channels = channel_parameters(architecture)
        self._routed = {
            architecture.block_prefix(unit.block) + path: (index, axis)
            for index, unit in enumerate(source.units)
            for path, axis in unit.expert_axes.items()
            if plan.units[index].loses_experts
        }
        self._gone = tuple(
            f"{architecture.module_name(unit)}."
            for unit, entry in zip(source.units, plan.units, strict=True)
            if not entry.kept
        )

    def new_name(self, name: str) -> str | None:
        """Return what a parameter is called in the pruned model; None if it is gone."""
        if name.startswith(self._gone):
            return None
        return name_without_blocks(self.source.architecture, self.plan.removed_blocks, name)

    def renamed(self, of_all: Mapping[str, T]) -> dict[str, T]:
        """Return the values of the parameters that stay, by their new names."""
        pairs = ((self.new_name(name), value) for name, value in of_all.items())
        return {new: value for new, value in pairs if new is not None}

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a parameter of the pruned model."""
        spec = self.source.parameters[name]
        if name in self._routed:
            index, axis = self._routed[name]
            return spec.with_length(axis, len(self.plan.units[index].kept_ffns))
        if name in self._channels:
            index, path = self._channels[name]
            axis_of, entry = self.source.units[index].axes[path], self.plan.units[index]
            spec = spec.with_length(axis_of.axis, axis_of.entries * entry.kept_width)
            if entry.loses_experts:
                spec = spec.with_length(0, len(entry.kept_ffns))
        return spec

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the pruned model."""
        tensor = self.source.parameter(name)
        if name in self._routed:
            index, axis = self._routed[name]
            kept = torch.tensor(self.plan.units[index].kept_ffns, device=tensor.device)
            return tensor.index_select(axis, kept)
        if tensor.shape != self.spec(name).shape:
            index, path = self._channels[name]
            entry = self.plan.units[index]
            kept_EK = [entry.kept_of(ffn) for ffn in range(entry.ffns)]
            tensor = self.source.units[index].select(path, tensor, kept_EK)
        return tensor

    def stored_names(self) -> dict[str, str]:
        """Return the stored tensors that stay, if no expert goes, and what they will be called."""
        names = names_without_blocks(self.source, self.plan.removed_blocks)
        gone = {name for prefix in self._gone for name in self.source.stored.within(prefix)}
        return {name: new for name, new in names.items() if name not in gone}


class PrunedSource(WeightSource):
    """A model as surgery would leave it, seen as a weight source; nothing is written.

    Blocks are those that stay, numbered through. Its tensors are its parameters, by their names in
    the model, and those of the source that no parameter takes.

    Args:
        source: the model.
        plan: which channels stay.
        repaired: parameters that repair changed, by their `origin`, already in pruned shape.
    """

    def __init__(
        self, source: WeightSource, plan: PruningPlan, repaired: Mapping[str, TensorFile]
    ) -> None:
        removed = plan.removed_blocks
        self.config = pruned_config(
            source.config, source.architecture, removed, plan.kept_widths, plan.kept_experts
        )
        architecture = source.architecture.without_blocks(removed)
        if plan.kept_experts is not None:
            architecture = architecture.with_experts(plan.kept_experts)
        self.architecture = architecture.with_widths(plan.kept_widths)
        self.label = source.label
        self._cut, self._repaired = Cut(source, plan), repaired
        self._origin = self._cut.renamed({name: name for name in source.parameters})
        names = self._cut.stored_names()
        self._unused = {names[name]: name for name in source.stored.unused if name in names}
        self.specs = {
            **{new: source.specs[name] for new, name in self._unused.items()},
            **{new: self._cut.spec(name) for new, name in self._origin.items()},
        }
        tied = {name: self._cut.new_name(to) or to for name, to in source.tied.items()}
        self.stored = StoredTensors.as_in_memory(
            self.specs,
            self._unused.keys() - self._origin.keys(),
            self._cut.renamed(tied),
            self._cut.renamed(source.faults),
        )

    def origin(self, name: str) -> str:
        """Return what a parameter is called in the model that this one is cut from."""
        return self._origin.get(name, name)

    def read(self, name: str) -> Tensor:
        """Return one tensor in its own dtype."""
        if name in self._origin:
            return self._value(self._origin[name])
        return self._cut.source.read(self._unused[name])

    def _value(self, origin: str) -> Tensor:
        if origin in self._repaired:
            return self._repaired[origin].read(origin)
        return self._cut.parameter(origin)

    def outgoing(self) -> Iterator[OutgoingTensor]:
        """Yield the tensors to be written, in the source's order and in the form of its own."""
        source, names = self._cut.source, self._cut.stored_names()
        parameter_of = {
            name: origin
            for origin in self._origin.values()
            for name in source.stored.sources(origin)
        }
        changed: dict[str, _Changed] = {}
        for name, new in names.items():
            together = []
            if name in parameter_of:
                together = source.stored.made_with(parameter_of[name])
            if not any(map(self._changes, together)):
                yield OutgoingTensor(new, source.specs[name], partial(source.chunks, name))
                continue
            first = together[0]
            if first not in changed:
                specs = {origin: self._cut.spec(origin) for origin in together}
                changed[first] = _Changed(
                    specs_of(self._stored(meta(specs, together))),
                    partial(self._stored_values, together),
                )
            if name in changed[first].specs:  # else of an expert too many
                spec, chunks = changed[first].specs[name], partial(changed[first].chunks, name)
                yield OutgoingTensor(new, spec, chunks)

    def _changes(self, origin: str) -> bool:
        has_other_shape = self._cut.spec(origin) != self._cut.source.parameters[origin]
        return has_other_shape or origin in self._repaired

    def _stored_values(self, origins: Sequence[str]) -> dict[str, Tensor]:
        return self._stored({origin: self._value(origin) for origin in origins})

    def _stored(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._cut.source.stored.as_stored(values, self.config)


class _Changed:
    """Stored tensors that are made anew together, when the first of them is written.

    Args:
        specs: of these tensors, by their names in the source.
        make: makes them.
    """

    def __init__(
        self, specs: Mapping[str, TensorSpec], make: Callable[[], dict[str, Tensor]]
    ) -> None:
        self.specs, self._make = specs, make
        self._left: dict[str, Tensor] = {}

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the raw bytes of one of them."""
        if name not in self._left:
            self._left = self._make()
        yield from tensor_chunks(self._left.pop(name))


def pruned_specs(source: WeightSource, plan: PruningPlan) -> dict[str, TensorSpec]:
    """Return dtype and shape of everything in the pruned model; see `PrunedSource`."""
    return PrunedSource(source, plan, {}).specs


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
        repaired: parameters that repair changed, by their `origin`, already in pruned shape.
        max_shard_bytes: size of a shard; a larger single tensor gets a shard of its own.

    Raises:
        OSError: the disk is full or not writable.
        CheckpointError: the source ended or changed.
    """
    pruned = PrunedSource(source, plan, repaired or {})
    return write_shards(directory, list(pruned.outgoing()), max_shard_bytes)

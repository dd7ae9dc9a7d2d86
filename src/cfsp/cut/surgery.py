"""Surgery: obeys a plan, parameter by parameter.

The parameters of a unit lose rows or columns, and the biases of removed channels. Those of removed
attention layers, experts and blocks are left out, and routers lose rows. What is cut is stored in
the form that the checkpoint has; all else is copied byte for byte. The tensors of later experts and
blocks get other names.
Tensors stream from the source to the new shards: of what is cut, only what shares stored tensors is
in memory at a time, at most the experts of one block.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsp.checkpoint.pruned_config import config_changes
from cfsp.checkpoint.reading import LoadedModel, WeightSource
from cfsp.checkpoint.skeleton import PRUNED_KEY, build_skeleton, tie
from cfsp.checkpoint.stored_blocks import name_without_blocks, names_without_blocks
from cfsp.checkpoint.stored_tensors import StoredTensors
from cfsp.checkpoint.tensor_file import FileTensor, MadeTensor, StoredTensor, TensorSpec
from cfsp.checkpoint.text_config import PREDICTED, prediction_layers
from cfsp.planning.plan_file import PruningPlan

T = TypeVar("T")


class PrunedSource(WeightSource):
    """A model as surgery would leave it, seen as a weight source; nothing is written.

    Blocks are those that stay, numbered through. Its tensors are its parameters, by their names in
    the model, and those of the source that no parameter takes. An origin is what a parameter is
    called in the source; by it come those that repair changed, already in pruned shape.
    """

    def __init__(
        self,
        source: WeightSource,
        plan: PruningPlan,
        repaired: Mapping[str, FileTensor] | None = None,
    ) -> None:
        removed = plan.removed_blocks
        changes = config_changes(
            source.config, source.architecture, plan.kept_widths, removed, plan.kept_experts
        )
        behind = prediction_layers(source.config) and source.stored.behind(source.architecture)
        if removed and behind:  # these go too: `names_without_blocks`
            changes = replace(changes, text={**changes.text, PREDICTED: 0})
        self.changes = changes
        self.config = self.changes.applied_to(source.config)
        architecture = source.architecture.without_blocks(removed)
        if plan.kept_experts is not None:
            architecture = architecture.with_experts(plan.kept_experts)
        self.architecture = architecture.with_widths(plan.kept_widths)
        self.label = source.label
        self._source, self._plan, self._repaired = source, plan, repaired or {}
        self._cut = {
            source.architecture.block_prefix(unit.block) + path: (unit, entry, path)
            for unit, entry in zip(source.units, plan.units, strict=True)
            for path in (*unit.axes, *unit.expert_axes)
        }
        self._gone = tuple(
            f"{source.architecture.module_name(unit)}."
            for unit, entry in zip(source.units, plan.units, strict=True)
            if not entry.kept
        )
        self._origin = self._renamed({name: name for name in source.parameters})
        gone = {name for prefix in self._gone for name in source.stored.within(prefix)}
        # Stored tensors that stay, if no expert goes, and what they will be called.
        names = self._names = {
            name: new
            for name, new in names_without_blocks(source, removed).items()
            if name not in gone
        }
        unused = {names[name]: name for name in source.stored.unused if name in names}
        tensors: dict[str, StoredTensor] = {
            **{new: source.stored.tensors[name] for new, name in unused.items()},
            **{
                new: MadeTensor(self._spec(origin), partial(self._value, origin))
                for new, origin in self._origin.items()
            },
        }
        tied, twice = (
            self._renamed({name: self._new_name(to) or to for name, to in pairs.items()})
            for pairs in (source.tied, source.stored.twice)
        )
        only_stored = unused.keys() - self._origin.keys()
        self.stored = StoredTensors.as_in_memory(tensors, only_stored, tied, twice)

    def _new_name(self, name: str) -> str | None:
        """Return what a parameter of the source is called here; None if it is gone."""
        if name.startswith(self._gone):
            return None
        return name_without_blocks(self._source.architecture, self._plan.removed_blocks, name)

    def _renamed(self, of_all: Mapping[str, T]) -> dict[str, T]:
        pairs = ((self._new_name(name), value) for name, value in of_all.items())
        return {new: value for new, value in pairs if new is not None}

    def origin(self, name: str) -> str:
        """Return what a parameter is called in the model that this one is cut from."""
        return self._origin.get(name, name)

    def _spec(self, origin: str) -> TensorSpec:
        spec = self._source.parameters[origin]
        if origin not in self._cut:
            return spec
        unit, entry, path = self._cut[origin]
        if path in unit.axes:
            along = unit.axes[path]
            spec = spec.with_length(along.axis, along.entries * entry.kept_width)
        if entry.loses_experts:
            spec = spec.with_length(unit.expert_axes.get(path, 0), len(entry.kept_ffns))
        return spec

    def _value(self, origin: str) -> Tensor:
        if origin in self._repaired:
            return self._repaired[origin].read()
        tensor = self._source.parameter(origin)
        if tensor.shape == self._spec(origin).shape:
            return tensor
        unit, entry, path = self._cut[origin]
        if path in unit.expert_axes:
            kept = torch.tensor(entry.kept_ffns, device=tensor.device)
            return tensor.index_select(unit.expert_axes[path], kept)
        return unit.select(path, tensor, [entry.kept_of(ffn) for ffn in range(entry.ffns)])

    def outgoing(self) -> Mapping[str, StoredTensor]:
        """Return the tensors to be written, in the source's order and in the form of its own."""
        source = self._source
        changed = {
            origin: self.specs[new]
            for new, origin in self._origin.items()
            if origin in self._repaired or self.specs[new] != source.parameters[origin]
        }
        return source.stored.outgoing(changed, self._value, self.config, self._names)


def build_pruned_model(
    source: LoadedModel,
    plan: PruningPlan,
    repaired: Mapping[str, FileTensor],
    facts: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Return the pruned model that a plan describes; the original shares its unpruned tensors.

    `save_pretrained` writes what `cfsp prune` writes but for the files that only cfsp reads. What
    `cfsp inspect` tells of those (`facts`, as JSON types) travels in the config, as `cfsp`.
    """
    model, smaller = source.model, PrunedSource(source, plan, repaired)
    config = smaller.config
    config._name_or_path = ""  # there is the original
    if facts is not None:
        setattr(config, PRUNED_KEY, facts)
    pruned = build_skeleton(config, model.dtype)
    tensors = {
        name: smaller.parameter(name)
        for name in pruned.state_dict()
        if name in smaller.parameters  # tied weights are not
    }
    pruned.load_state_dict(tensors, strict=False, assign=True)
    tie(pruned, tensors)
    still_empty = [name for name, p in pruned.named_parameters() if p.is_meta]
    assert not still_empty, still_empty
    pruned.to(model.device)
    if model.can_generate():
        pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned

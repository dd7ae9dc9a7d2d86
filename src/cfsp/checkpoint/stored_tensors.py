"""Which stored tensors make up which parameters of a model, and back.

transformers renames and converts stored tensors when it loads them. All of cfsp speaks of
parameters as they are in memory; this module goes between the two, by transformers' own rules.

    stored = StoredTensors.of(model, architecture, tensors)
    stored.sources("model.layers.0.mlp.experts.down_proj")  # model.layers.0.block_sparse_moe...
    stored.assemble("model.layers.0.mlp.experts.down_proj")
    stored.outgoing({"model.layers.0.mlp.experts.down_proj": narrower}, value, config)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cfsp.architecture.found import Architecture
from cfsp.checkpoint.conversion import Conversion, find_conversions, meta
from cfsp.checkpoint.tensor_file import AGAIN, MadeTensor, StoredTensor, TensorSpec, specs_of
from cfsp.errors import CheckpointError, UnsupportedModelError

# What every old checkpoint may hold in its layers and transformers keeps elsewhere.
_OLD_BUFFER = "rotary_emb.inv_freq"
_HEADLESS = (
    ", its head (models of embeddings have none: give the language model that one was made from)"
)


@dataclass(frozen=True)
class StoredTensors:
    """The stored tensors of a model, and which of them make up which parameters in memory.

    Parameters here are parameters and stored buffers, by their names in the model.
    """

    tensors: Mapping[str, StoredTensor]  # in their order
    parameters: Mapping[str, TensorSpec]  # of all that is made of them
    tied: Mapping[str, str]  # parameters that nothing is stored of, and the one with the value
    twice: Mapping[str, str]  # those that may be copies of another one, of which both are stored
    unused: tuple[str, ...]  # that no parameter takes, such as those of multi-token prediction
    _made_by: Mapping[str, Conversion] = field(repr=False)

    @staticmethod
    def of(
        model: PreTrainedModel,
        architecture: Architecture,
        tensors: Mapping[str, StoredTensor],
        label: str = "the checkpoint",
    ) -> StoredTensors:
        """Find what becomes of the tensors of a checkpoint, by the model of its class and config.

        Only names and shapes count, so the model may be on the meta device. What its modules no
        longer have is left out; what is stored as the tied one of two, as a head, gets the name of
        the other, which transformers stores and others look for. A parameter that is missing or has
        another shape is a `CheckpointError`, a unit that cannot be stored again an
        `UnsupportedModelError`.
        """
        specs = {name: tensor.spec for name, tensor in tensors.items()}
        conversions, unused = find_conversions(model, specs)
        made_by: dict[str, Conversion] = {}
        parameters: dict[str, TensorSpec] = {}
        for conversion in (each.without_choice() for each in conversions):
            for name, spec in conversion.made.items():
                made_by[name], parameters[name] = conversion, spec
        tied = _tied(model, made_by)
        # Loading makes up by chance what is missing; cutting does not look at what it leaves.
        for fault in _faults_of(model, conversions, made_by, parameters, tied):
            raise CheckpointError(f"{label} {fault}; {AGAIN}")
        ties = dict(_ties(model))
        if turned := {made_by[n].stored[0]: to for to, n in tied.items() if ties.get(n) == to}:
            usual = {turned.get(name, name): tensor for name, tensor in tensors.items()}
            return StoredTensors.of(model, architecture, usual, label)
        stale = set(_stale(model, unused))
        stored = StoredTensors(
            tensors={name: tensor for name, tensor in tensors.items() if name not in stale},
            parameters=parameters,
            tied=tied,
            twice={name: to for name, to in _ties(model) if {name, to} <= made_by.keys()},
            unused=tuple(name for name in unused if name not in stale),
            _made_by=made_by,
        )
        stored._check_can_be_cut(architecture)
        return stored

    @staticmethod
    def as_in_memory(
        tensors: Mapping[str, StoredTensor],
        unused: Collection[str],
        tied: Mapping[str, str],
        twice: Mapping[str, str],
    ) -> StoredTensors:
        """Return those of a model each of whose parameters is a stored tensor of the same name."""
        specs = {name: each.spec for name, each in tensors.items() if name not in unused}
        made_by = {name: Conversion(name, {name: [name]}, specs, None) for name in specs}
        return StoredTensors(tensors, specs, tied, twice, tuple(unused), made_by)

    def _check_can_be_cut(self, architecture: Architecture) -> None:
        """Check that all parameters that have channels or experts can be stored again."""
        checked: set[object] = set()  # alike in all blocks
        for unit in architecture.units:
            for path in (*unit.axes, *unit.expert_axes):
                name = architecture.block_prefix(unit.block) + path
                conversion = self._made_by[name]
                specs = tuple(conversion.specs[stored] for stored in conversion.stored)
                kind = id(conversion.converter), specs, unit.part
                if conversion.converter is None or kind in checked:
                    continue
                checked.add(kind)
                if unit.part == "kv":
                    raise UnsupportedModelError(
                        f"{conversion.stored[0]} of an attention is converted when it is loaded, "
                        "and cfsp cannot tell where it has its heads; prune the model without the "
                        "part kv"
                    )
                self._check_reverts(conversion)

    def _check_reverts(self, conversion: Conversion) -> None:
        found: dict[str, TensorSpec] = {}
        problem: Exception | None = None
        try:
            made = conversion.convert(meta(conversion.specs, conversion.stored))
            found = specs_of(conversion.revert(made, conversion.model.config))
        except Exception as error:  # whatever a converter says to shapes that it did not expect
            problem = error
        if found != {name: conversion.specs[name] for name in conversion.stored}:
            raise UnsupportedModelError(
                f"{conversion.target}, made of {conversion.stored[0]}, cannot be stored again in "
                "the form that the checkpoint has; load it with transformers, call "
                "save_pretrained(), and prune the result"
            ) from problem

    def sources(self, parameter: str) -> tuple[str, ...]:
        """Return the stored tensors that a parameter is made of; none if it is tied or missing."""
        conversion = self._made_by.get(parameter)
        return () if conversion is None else conversion.stored

    def within(self, prefix: str) -> list[str]:
        """Return the stored tensors of the parameters whose names in the model begin so."""
        found = (
            name
            for parameter, conversion in self._made_by.items()
            if parameter.startswith(prefix)
            for name in conversion.stored
        )
        return list(dict.fromkeys(found))

    def behind(self, architecture: Architecture) -> list[str]:
        """Return those that are numbered as blocks behind the last: of multi-token prediction."""
        block_of = {name: architecture.block_of(name) for name in self.unused}
        count = architecture.block_count
        return [name for name, block in block_of.items() if block is not None and block >= count]

    def assemble(
        self, parameter: str, dtype: torch.dtype | None = None, expert: int | None = None
    ) -> Tensor:
        """Return a parameter as the model in memory holds it, or one expert's part of it.

        None as dtype is its own. Where stored tensors lie side by side, one at a time is in memory
        beside the whole.
        """

        def read(name: str, row: int | None = None) -> Tensor:
            return self.tensors[name].read(row).to(dtype)

        conversion = self._made_by[parameter]
        if conversion.converter is None:
            (name,) = conversion.stored
            return read(name, expert)
        if conversion.placed is None:
            whole = conversion.convert({name: read(name) for name in conversion.stored})[parameter]
            return whole if expert is None else whole[expert]
        place_of, shape = conversion.placed, conversion.made[parameter].shape
        if expert is not None:
            place_of = {name: place[1:] for name, place in place_of.items() if place[0] == expert}
            shape = shape[1:]
        found: Tensor | None = None
        for name, place in place_of.items():
            tensor = read(name)
            if found is None:
                found = tensor.new_empty(shape)
            found[place] = tensor
        assert found is not None
        return found

    def outgoing(
        self,
        changed: Mapping[str, TensorSpec],
        value: Callable[[str], Tensor],
        config: Any,
        names: Mapping[str, str] | None = None,
    ) -> dict[str, StoredTensor]:
        """Return the stored tensors to be written, in their order and form, some of them anew.

        `changed` has the new parameters, `value` gives them and those that share stored tensors
        with them; `config` is the new model's. `names` has the new names of those that stay; None
        for all under their own.
        """

        def make(conversion: Conversion, name: str, made: dict[str, Tensor]) -> Tensor:
            if name not in made:
                made.update(
                    conversion.revert({each: value(each) for each in conversion.made}, config)
                )
            return made.pop(name)

        found, specs = dict(self.tensors), {**self.parameters, **changed}
        # What shares stored tensors is made anew together, when the first of them is written.
        for conversion in dict.fromkeys(self._made_by[each] for each in changed):
            made: dict[str, Tensor] = {}
            for name in conversion.stored:
                del found[name]  # it may be of an expert too many
            empty = meta(specs, conversion.made)
            for name, spec in specs_of(conversion.revert(empty, config)).items():
                found[name] = MadeTensor(spec, partial(make, conversion, name, made))
        names = {name: name for name in self.tensors} if names is None else names
        return {new: found[name] for name, new in names.items() if name in found}


def _ties(model: PreTrainedModel) -> Iterable[tuple[str, str]]:
    return (getattr(model, "all_tied_weights_keys", None) or {}).items()


def _tied(model: PreTrainedModel, made_by: Mapping[str, Conversion]) -> dict[str, str]:
    groups: dict[object, list[str]] = {}
    for tied, to in _ties(model):
        groups.setdefault(to, [to]).append(tied)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    found: dict[str, str] = {}
    for names in groups.values():
        stored = next((name for name in names if name in made_by), None)
        if stored is not None:
            found |= {name: stored for name in names if name not in made_by}
    return found


def _stale(model: PreTrainedModel, unused: Mapping[str, str]) -> Iterator[str]:
    """Yield unused stored tensors whose module the model has."""
    modules = {name for name, _ in model.named_modules()} - {""}
    for name, target in unused.items():
        module = target.rpartition(".")[0]
        prefixed = f"{model.base_model_prefix}.{module}"
        if module in modules or prefixed in modules or name.endswith(_OLD_BUFFER):
            yield name


def _faults_of(
    model: PreTrainedModel,
    conversions: Sequence[Conversion],
    made_by: Mapping[str, Conversion],
    made: Mapping[str, TensorSpec],
    tied: Mapping[str, str],
) -> Iterator[str]:
    """Yield what is wrong with parameters that the stored tensors do not make up."""
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    head: Any = model.get_output_embeddings()
    incomplete = {conversion.target for conversion in conversions}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if name in made and made[name].shape != shape:
            own = made_by[name]
            what = own.stored[0] if own.converter is None else f"tensors for {name}"
            found = list(made[name].shape)
            yield f"has {what} of shape {found}, its config asks for {list(shape)}"
        elif name not in (made.keys() | tied.keys()):
            if name in incomplete:
                yield f"has no tensors that {name} can be made of"
            elif not any(re.search(pattern, name) for pattern in optional):
                of_head = head is model.get_submodule(name.rpartition(".")[0])
                yield f"lacks the tensor {name}{_HEADLESS if of_head else ''}"

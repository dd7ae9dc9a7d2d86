"""How transformers makes the parameters of a model out of the tensors that a checkpoint stores.

It renames stored tensors, and converts some: the matrices of all experts become one parameter, or
one stored matrix becomes gate and up. All that uses its functions for that, and for the way back,
is in this module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, conversion_mapping
from transformers.core_model_loading import (
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from cfsp.checkpoint.tensor_file import TensorSpec, specs_of

Place = tuple[int | slice, ...]  # index into a parameter


@dataclass(frozen=True, eq=False)
class Conversion:
    """Stored tensors, and the parameters that transformers makes of them."""

    target: str  # the parameter, or the first of several
    sources: dict[str, list[str]]  # in the order in which the converter wants them, by its patterns
    specs: Mapping[str, TensorSpec] = field(repr=False)  # of the stored tensors
    model: Any = field(repr=False)  # with the config, and parameters of which only shapes count
    converter: Any = None  # `WeightConverter`; None if the only stored tensor is the parameter
    # Of transformers, that some name of the checkpoint went through.
    renamings: list[Any] = field(default_factory=list, repr=False)

    @property
    def stored(self) -> tuple[str, ...]:
        """The names of all its stored tensors."""
        return tuple(name for names in self.sources.values() for name in names)

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that the converter makes of stored tensors, which may be empty."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, tensors[name])
        made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def revert(self, parameters: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Return the stored tensors that all of its parameters are made of: undo `convert`."""
        if self.converter is None:
            return {self.stored[0]: parameters[self.target]}
        loaded = SimpleNamespace(
            config=config,
            get_parameter=parameters.__getitem__,
            _weight_conversions=[*self.renamings, self.converter],
        )
        return as_saved(loaded, parameters)

    @cached_property
    def made(self) -> dict[str, TensorSpec]:
        """Types and shapes of the parameters that it makes; of none if it cannot."""
        if self.converter is None:
            return {self.target: self.specs[self.stored[0]]}
        try:
            return specs_of(self.convert(meta(self.specs, self.stored)))
        except Exception:  # whatever a converter says to shapes that do not fit
            return {}

    def without_choice(self) -> Conversion:
        """Return the same, where it asks for shapes with the answer that they have now."""
        # What is to be stored as it was before has to know whether a matrix was transposed.
        operations = [] if self.converter is None else self.converter.operations
        if [getattr(step, "check_dims", 0) for step in operations] != [True]:
            return self
        (name,), (step,) = self.stored, operations
        if self.specs[name].shape == tuple(self.model.get_parameter(self.target).shape):
            return replace(self, sources={name: [name]}, converter=None)
        always = copy.deepcopy(self.converter)
        always.operations = [Transpose(step.dim0, step.dim1)]
        return replace(self, converter=always)

    @cached_property
    def placed(self) -> dict[str, Place] | None:
        """Where each stored tensor lies in the only parameter; None if nowhere.

        That is the parameter itself, or experts, of each of which the tensors are joined.
        """
        if self.converter is None:
            return dict.fromkeys(self.stored, ())
        operations = self.converter.operations
        match [(type(step).__name__, getattr(step, "dim", None)) for step in operations]:
            case [("MergeModulelist", 0)] if len(self.sources) == 1:
                joined = 0
            case [("MergeModulelist", 0), ("Concatenate", int(axis))] if axis > 0:
                joined = axis - 1  # the same axis in a stored tensor
            case _:
                return None
        # Else they do not fit each other, or are single numbers.
        if self.target not in self.made or len(self.made[self.target].shape) < joined + 2:
            return None
        found: dict[str, Place] = {}
        end = 0
        for run in filter(None, map(self.sources.get, self.converter.source_patterns)):
            start, end = end, end + self.specs[run[0]].shape[joined]
            place = (*(slice(None),) * joined, slice(start, end))
            found |= {name: (expert, *place) for expert, name in enumerate(run)}
        return found


def find_conversions(
    model: PreTrainedModel, specs: Mapping[str, TensorSpec]
) -> tuple[list[Conversion], dict[str, str]]:
    """Return what becomes of the names of stored tensors when transformers loads them.

    Second come those that it leaves, with the name that each would have in memory. It is the first
    half of transformers' `convert_and_load_state_dict_in_model`, without values.
    """
    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    in_memory, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Conversion] = {}
    unused: dict[str, str] = {}
    used: list[Any] = []
    # As transformers goes through them: expert 2 before expert 10.
    for name in sorted(specs, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, in_memory)
        if target not in in_memory and name in in_memory:
            target, pattern = name, None
        if target not in in_memory:
            unused[name] = target
        elif pattern is not None:
            conversion = found.setdefault(
                target, Conversion(target, {}, specs, model, converter_of[pattern], used)
            )
            if conversion.converter is None:  # the parameter itself is stored as well
                unused[name] = target
            else:
                conversion.sources.setdefault(pattern, []).append(name)
        elif target in found:  # a second name of the same parameter
            unused[name] = target
        else:
            found[target] = Conversion(target, {name: [name]}, specs, model)
    used += [entry for entry in renamings if entry.was_used()]
    return list(found.values()), unused


def as_saved(model: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names, and in the shapes, that `save_pretrained` gives them."""
    return dict(revert_weight_conversion(model, dict(state)))


def missing_prefix(model: PreTrainedModel, stored: Iterable[str]) -> str:
    """Return what names lack in a checkpoint of a base model alone, such as GPT-2's on the hub."""
    prefix = f"{model.base_model_prefix}."
    names = set(stored)
    in_memory = model.state_dict()
    if any(name.startswith(prefix) for name in names) or not any(
        prefix + name in in_memory for name in names
    ):
        return ""
    expected = set(as_saved(model, on_meta(in_memory)))
    is_base = names.isdisjoint(expected) and any(prefix + name in expected for name in names)
    return prefix if is_base else ""


def saved_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what `save_pretrained` would write, by the names in memory; of tied tensors one."""
    state: dict[str, Tensor] = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    for tied, to in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if tied in state and to in state:
            one, other = state[tied], state[to]
            if one.is_meta or one.data_ptr() == other.data_ptr():
                del state[tied]
    return state


def stored_from_memory(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model in memory as `save_pretrained` would store them.

    They are views into it, but copies of what saving transposes or interleaves in a few classes.
    """
    state = saved_state(model)
    specs = specs_of(as_saved(model, on_meta(state)))
    tensors: dict[str, Tensor] = {}
    for conversion in find_conversions(model, specs)[0]:
        if conversion.placed is not None and conversion.target in state:
            whole = state.pop(conversion.target)
            tensors |= {name: whole[place] for name, place in conversion.placed.items()}
    if len(tensors) < len(specs):
        tensors |= as_saved(model, state)
    return {name: tensors[name] for name in specs}


def on_meta(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without their values."""
    return {name: tensor.detach().to("meta") for name, tensor in tensors.items()}


def meta(specs: Mapping[str, TensorSpec], names: Iterable[str]) -> dict[str, Tensor]:
    """Return tensors of these types and shapes without values."""
    return {
        name: torch.empty(specs[name].shape, dtype=specs[name].dtype, device="meta")
        for name in names
    }

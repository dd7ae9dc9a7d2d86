"""Which stored tensors make up which parameters of a model, and where they keep FFN channels.

transformers renames and converts stored tensors when it loads them. All of cfsp speaks of tensors
as they are stored; this module goes between the two, by transformers' own rules.

    stored = StoredTensors.of(model, architecture, specs)
    stored.sources("model.layers.0.mlp.experts.down_proj")  # model.layers.0.block_sparse_moe...
    stored.assemble("model.layers.0.mlp.experts.down_proj", checkpoint.read)
    stored.layouts["model.layers.0.block_sparse_moe.experts.5.w2.weight"]
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from cfsp.architecture.found import Architecture
from cfsp.checkpoint.conversion import (
    Conversion,
    ModelShapes,
    convert,
    find_conversions,
    places,
)
from cfsp.checkpoint.layout_tracing import channel_parameters, layouts_of
from cfsp.checkpoint.stored_blocks import name_without_blocks
from cfsp.checkpoint.stored_faults import faults_of, shapes_made
from cfsp.checkpoint.stored_layout import ChannelLayout, Role
from cfsp.checkpoint.tensor_file import AGAIN, TensorSpec
from cfsp.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

T = TypeVar("T")

# What every old checkpoint may hold in its layers and transformers keeps elsewhere.
_OLD_BUFFER = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class StoredTensors:
    """Which stored tensors make up which parameters of a model in memory.

    Parameters here are parameters and stored buffers, by their names in the model.

    Attributes:
        specs: of the stored tensors.
        layouts: where stored tensors keep FFN channels; the others are not in it.
        expert_axes: of stored tensors without channels that have an axis of experts (see
            `Unit.expert_axes`), the index of the unit in the architecture and which axis it is.
        tied: parameters that nothing is stored of, and the one whose value each has.
        unused: stored tensors that no parameter takes: of modules that the model does not have
            (multi-token prediction), and stale ones.
        stale: those of `unused` that belong to a module of the model, which no longer has them.
        faults: parameters whose stored tensors are missing or have another shape, and what is
            wrong, as the end of a sentence.
    """

    specs: Mapping[str, TensorSpec]
    layouts: Mapping[str, ChannelLayout]
    expert_axes: Mapping[str, tuple[int, int]]
    tied: Mapping[str, str]
    unused: tuple[str, ...]
    stale: tuple[str, ...]
    faults: Mapping[str, str]
    _shapes: ModelShapes = field(repr=False)
    _conversions: Mapping[str, Conversion] = field(repr=False)

    @cached_property
    def matrix_names(self) -> dict[tuple[int, Role, int | None], str]:
        """The stored tensor of each matrix, by unit, role and FFN: None where it is of all FFNs."""
        return {
            (layout.unit, layout.role, layout.ffn): name
            for name, layout in self.layouts.items()
            if not layout.is_bias
        }

    @staticmethod
    def of(
        model: PreTrainedModel,
        architecture: Architecture,
        specs: Mapping[str, TensorSpec],
        label: str = "the checkpoint",
    ) -> StoredTensors:
        """Find what becomes of the tensors of a checkpoint.

        Args:
            model: of the class and config that the checkpoint is loaded with; only names and
                shapes count, so it may be on the meta device.
            architecture: of the model.
            specs: of the stored tensors.
            label: what to call the checkpoint in an error.

        Raises:
            CheckpointError: a tensor of an FFN is missing or has another shape.
            UnsupportedModelError: a stored tensor cannot be cut along one axis.
        """
        shapes = ModelShapes(
            model.config,
            {name: tensor.detach().to("meta") for name, tensor in model.state_dict().items()},
        )
        conversions, unused = find_conversions(model, specs)
        made_by: dict[str, Conversion] = {}
        found_shapes: dict[str, tuple[int, ...]] = {}
        for conversion in conversions:
            for name, shape in shapes_made(conversion, specs, shapes).items():
                made_by[name], found_shapes[name] = conversion, shape
        tied = _tied(model, made_by)
        faults = faults_of(model, shapes, specs, made_by, found_shapes, tied)
        parameters = channel_parameters(architecture, shapes)
        for name in parameters:
            if name in faults:
                raise CheckpointError(f"{label} {faults[name]}; {AGAIN}")
            if name in tied:
                raise UnsupportedModelError(
                    f"{name} of an FFN has its values from {tied[name]}; FFNs that share weights "
                    "cannot be pruned"
                )
        return StoredTensors(
            specs=specs,
            layouts=layouts_of(conversions, specs, parameters, made_by, shapes),
            expert_axes=_expert_axes(architecture, made_by, faults, label),
            tied=tied,
            unused=tuple(unused),
            stale=tuple(_stale(model, unused)),
            faults=faults,
            _shapes=shapes,
            _conversions=made_by,
        )

    def of_widths(
        self, architecture: Architecture, specs: Mapping[str, TensorSpec]
    ) -> StoredTensors:
        """Return the same of a model whose FFN units have other widths, or fewer experts.

        Some converters compare shapes with those of the model.

        Args:
            architecture: with these widths.
            specs: of the stored tensors with these widths.
        """
        tensors = dict(self._shapes.tensors)
        for unit in architecture.units:
            for name, axis in unit.axes.items():
                full_name = architecture.block_prefix(unit.block) + name
                shape = list(tensors[full_name].shape)
                shape[axis.axis] = axis.entries * unit.width
                if unit.routed:
                    shape[0] = unit.ffns
                tensors[full_name] = tensors[full_name].new_empty(shape)
            for name, expert_axis in unit.expert_axes.items():
                full_name = architecture.block_prefix(unit.block) + name
                shape = list(tensors[full_name].shape)
                shape[expert_axis] = unit.ffns
                tensors[full_name] = tensors[full_name].new_empty(shape)
        return replace(self, specs=specs, _shapes=ModelShapes(self._shapes.config, tensors))

    def without(
        self,
        architecture: Architecture,
        removed: Collection[int],
        gone: Collection[int],
        config: PreTrainedConfig,
        specs: Mapping[str, TensorSpec],
    ) -> StoredTensors:
        """Return the same of the model without some blocks and attentions.

        Stored tensors keep their names.

        Args:
            architecture: with all of them.
            removed: indices of the blocks that go.
            gone: the units that go: attentions, and those of these blocks.
            config: of the model without them.
            specs: of the stored tensors that stay.
        """
        units = architecture.units
        of_gone = tuple(f"{architecture.module_name(units[number])}." for number in gone)
        staying = [number for number in range(len(units)) if number not in gone]
        unit_of = {number: index for index, number in enumerate(staying)}

        def name_of(name: str) -> str | None:
            if name.startswith(of_gone):
                return None
            return name_without_blocks(architecture, removed, name)

        def renamed(of_all: Mapping[str, T]) -> dict[str, T]:
            return {
                new: value for name, value in of_all.items() if (new := name_of(name)) is not None
            }

        conversions = {
            name: replace(conversion, target=name_of(conversion.target) or conversion.target)
            for name, conversion in self._conversions.items()
        }
        return StoredTensors(
            specs=specs,
            layouts={
                name: replace(layout, unit=unit_of[layout.unit])
                for name, layout in self.layouts.items()
                if layout.unit in unit_of
            },
            expert_axes={
                name: (unit_of[unit], axis)
                for name, (unit, axis) in self.expert_axes.items()
                if unit in unit_of
            },
            tied=renamed({name: name_of(to) or to for name, to in self.tied.items()}),
            unused=tuple(name for name in self.unused if name in specs),
            stale=self.stale,
            faults=renamed(self.faults),
            _shapes=ModelShapes(config, renamed(self._shapes.tensors)),
            _conversions=renamed(conversions),
        )

    def with_experts(self, kept: Mapping[int, Sequence[int]]) -> StoredTensors:
        """Return the same of the model with some experts only; stored tensors keep their names.

        Args:
            kept: unit -> the experts that stay, of every unit that loses some.
        """

        def new(unit: int, ffn: int | None) -> int | None:
            return ffn if ffn is None or unit not in kept else list(kept[unit]).index(ffn)

        gone = self.of_gone_experts(kept)
        return replace(
            self,
            layouts={
                name: replace(layout, ffn=new(layout.unit, layout.ffn))
                for name, layout in self.layouts.items()
                if name not in gone
            },
            _conversions={
                name: replace(
                    conversion,
                    sources={
                        pattern: [source for source in sources if source not in gone]
                        for pattern, sources in conversion.sources.items()
                    },
                )
                for name, conversion in self._conversions.items()
            },
        )

    def of_gone_experts(self, kept: Mapping[int, Sequence[int]]) -> set[str]:
        """Return the stored tensors that are those of one expert each, which goes.

        Args:
            kept: unit -> the experts that stay, of every unit that loses some.
        """
        return {
            name
            for name, layout in self.layouts.items()
            if layout.unit in kept
            and layout.ffn is not None
            and layout.ffn not in kept[layout.unit]
        }

    def sources(self, parameter: str) -> tuple[str, ...]:
        """Return the stored tensors that a parameter is made of; none if it is tied or missing."""
        conversion = self._conversions.get(parameter)
        return () if conversion is None else conversion.stored

    def within(self, prefix: str) -> list[str]:
        """Return the stored tensors of the parameters whose names in the model begin so."""
        found = (
            name
            for parameter, conversion in self._conversions.items()
            if parameter.startswith(prefix)
            for name in conversion.stored
        )
        return list(dict.fromkeys(found))

    def check_complete(self, label: str) -> None:
        """Check that every parameter is stored, in the shape that the config asks for.

        Args:
            label: what to call the checkpoint.

        Raises:
            CheckpointError: one is not.
        """
        for fault in self.faults.values():
            raise CheckpointError(f"{label} {fault}; {AGAIN}")

    def assemble(self, parameter: str, read: Callable[[str], Tensor]) -> Tensor:
        """Return a parameter as the model in memory holds it.

        Where stored tensors lie side by side in it, one at a time is in memory beside the whole.

        Args:
            parameter: one that has sources.
            read: gives a stored tensor by name.
        """
        conversion = self._conversions[parameter]
        placed = places(conversion, self.specs)
        if conversion.converter is None:
            return read(conversion.stored[0])
        if placed is None:
            tensors = {name: read(name) for name in conversion.stored}
            return convert(conversion, tensors, self._shapes)[parameter]
        whole: Tensor | None = None
        for name, place in placed[0].items():
            tensor = read(name)
            if whole is None:
                whole = tensor.new_empty(placed[1])
            whole[place] = tensor
        assert whole is not None
        return whole

    def take_apart(self, parameter: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """Return the stored tensors that a parameter's value is made of, as views: undo `assemble`.

        None where the conversion does more than put them side by side.

        Args:
            parameter: one that has sources.
            tensor: its value.
        """
        placed = places(self._conversions[parameter], self.specs)
        if placed is None:
            return None
        return {name: tensor[place] for name, place in placed[0].items()}

    def down_names(self, unit: int) -> list[str]:
        """Return the stored tensors with the down projections of a unit, in the order of FFNs."""
        return [name for key, name in self.matrix_names.items() if key[:2] == (unit, "down")]


def _expert_axes(
    architecture: Architecture,
    made_by: Mapping[str, Conversion],
    faults: Mapping[str, str],
    label: str,
) -> dict[str, tuple[int, int]]:
    """Return which stored tensors without channels have an axis of experts; see `StoredTensors`.

    Raises:
        CheckpointError: one is missing or has another shape.
        UnsupportedModelError: one is converted when it is loaded.
    """
    found = {}
    for index, unit in enumerate(architecture.units):
        for name, axis in unit.expert_axes.items():
            full_name = architecture.block_prefix(unit.block) + name
            if full_name in faults:
                raise CheckpointError(f"{label} {faults[full_name]}; {AGAIN}")
            conversion = made_by[full_name]
            if conversion.converter is not None:
                raise UnsupportedModelError(
                    f"{conversion.stored[0]} is converted when it is loaded, and cfsp cannot tell "
                    "where it has its experts; prune the model without the part experts"
                )
            found[conversion.stored[0]] = (index, axis)
    return found


def _tied(model: PreTrainedModel, made_by: Mapping[str, Conversion]) -> dict[str, str]:
    """Return the parameters that nothing is stored of, and those that they are tied to."""
    groups: dict[object, list[str]] = {}
    for tied, to in (getattr(model, "all_tied_weights_keys", None) or {}).items():
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

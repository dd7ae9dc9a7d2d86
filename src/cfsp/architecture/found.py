"""What a model is made of, as cfsp sees it: blocks, and the FFN units in each.

    Architecture
      blocks        "model.layers"
      units         FFNUnit(block 0, "mlp", 1536 channels)
                    FFNUnit(block 1, "mlp.experts", 768 channels in each of 64 FFNs)
                    FFNUnit(block 1, "mlp.shared_expert", 1536 channels)

It is found in the model (`cfsp.architecture.discovery`), not looked up by the model's type, and
proved by execution (`cfsp.architecture.proof`).

Shapes: E experts, F FFN channels, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

# How gate and up share one matrix: all rows of the gate first, or row about row.
Fusion = Literal["halves", "interleaved"]


@dataclass(frozen=True)
class ChannelAxis:
    """Where a parameter has the channels of its FFN.

    Attributes:
        axis: the axis that channels lie along.
        fusion: how gate and up share that axis; None if each channel is there once.
    """

    axis: int
    fusion: Fusion | None = None

    @property
    def parts(self) -> int:
        """How often each channel is on the axis."""
        return 1 if self.fusion is None else 2

    def width(self, shape: Sequence[int]) -> int:
        """Return the number of channels of a tensor of this shape."""
        return shape[self.axis] // self.parts

    def index(self, kept_K: Tensor, width: int) -> Tensor:
        """Return the places on the axis of some channels, of `width` in all."""
        if self.fusion is None:
            return kept_K
        if self.fusion == "halves":
            return torch.cat([kept_K, kept_K + width])
        return torch.stack([2 * kept_K, 2 * kept_K + 1], dim=1).flatten()

    def select(self, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Return the tensor with the kept channels only."""
        kept_K = torch.tensor(kept, device=tensor.device)
        return tensor.index_select(self.axis, self.index(kept_K, self.width(tensor.shape)))

    def select_of_experts(self, tensor: Tensor, kept_EK: Sequence[Sequence[int]]) -> Tensor:
        """Return a tensor of all experts with the kept channels of each only.

        Args:
            tensor: begins with the axis of experts.
            kept_EK: for each expert the channels to keep, as many of each.
        """
        shape = list(tensor.shape)
        shape[self.axis] = self.parts * len(kept_EK[0])
        selected = tensor.new_empty(shape)
        of_one = replace(self, axis=self.axis - 1)
        for expert, kept_K in enumerate(kept_EK):
            selected[expert] = of_one.select(tensor[expert], kept_K)
        return selected


@dataclass(frozen=True)
class WidthAttribute:
    """A number that a module keeps of its own size, such as `in_features`.

    Attributes:
        module: dotted path from the block.
        name: of the attribute.
        times: how often the width it is.
    """

    module: str
    name: str
    times: int = 1


@dataclass(frozen=True)
class FFNUnit:
    """The FFNs of a block that share a width: a dense one, or all routed experts of the block.

    Attributes:
        block: index of the decoder block.
        path: dotted path from the block to the module; empty if the block itself holds the FFN.
        width: channels of each FFN.
        ffns: how many FFNs: 1, or the number of experts.
        up: the parameter whose outputs are channels, by its dotted path from the block.
        gate: that of the gate; the same as `up` where they are one matrix, None without a gate.
        down: that of the parameter whose inputs are channels.
        axes: every parameter that has a channel axis, by its dotted path from the block. Those of
            experts are three-dimensional and begin with the expert.
        attributes: numbers in the modules that tell the width.
        routed: whether its FFNs are experts that a router chooses among.
    """

    block: int
    path: str
    width: int
    ffns: int
    up: str
    gate: str | None
    down: str
    axes: dict[str, ChannelAxis]
    attributes: tuple[WidthAttribute, ...] = ()
    routed: bool = False

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one matrix."""
        return self.gate == self.up

    @property
    def kind(self) -> tuple[object, ...]:
        """All but the place: units of a kind are proved once."""
        return (self.width, self.ffns, *self.form)

    @property
    def form(self) -> tuple[object, ...]:
        """The kind without its numbers: what a smaller model of the same class has in common."""
        return (
            self.path, self.up, self.gate, self.down, tuple(self.axes.items()), self.attributes,
            self.routed,
        )  # fmt: skip

    @property
    def plain_axes(self) -> dict[str, tuple[int, int]]:
        """The axes as plain numbers, as `resize_ffn` and config.json have them."""
        return {name: (axis.axis, axis.parts) for name, axis in self.axes.items()}

    @property
    def plain_attributes(self) -> list[tuple[str, str, int]]:
        """The attributes as plain values, as `resize_ffn` and config.json have them."""
        return [(a.module, a.name, a.times) for a in self.attributes]

    def select(self, name: str, parameter: Tensor, kept_EK: Sequence[Sequence[int]]) -> Tensor:
        """Return one of its parameters with the kept channels of each FFN only.

        Args:
            name: dotted path from the block, one of `axes`.
            parameter: its values.
            kept_EK: for each FFN the channels to keep, as many of each.
        """
        axis = self.axes[name]
        if not self.routed:
            return axis.select(parameter, kept_EK[0])
        return axis.select_of_experts(parameter, kept_EK)

    def as_fused_as(self, other: FFNUnit) -> FFNUnit:
        """Return the same unit with gate and up sharing their matrix as in another one."""
        fusion = other.axes[other.up].fusion
        return self.with_fusion(fusion) if fusion else self

    def with_fusion(self, fusion: Fusion) -> FFNUnit:
        """Return the same unit with gate and up sharing their matrix in another way."""
        axes = {
            name: replace(axis, fusion=fusion) if axis.fusion else axis
            for name, axis in self.axes.items()
        }
        return replace(self, axes=axes)


@dataclass(frozen=True)
class Refusal:
    """Why a module that looks like an FFN is none whose channels can be cut.

    Attributes:
        module: its dotted path in the model.
        reason: in a few words.
    """

    module: str
    reason: str


@dataclass(frozen=True)
class Architecture:
    """The blocks of a model and their FFN units.

    Attributes:
        class_name: of the transformers class.
        decoder: dotted path from the model to the text decoder, which takes token ids and whose
            forward calls the blocks.
        blocks: dotted path from the model to the list of blocks.
        block_count: how many blocks.
        units: in the order of blocks, and within a block as they are registered.
        refused: modules that look like FFNs but are none that can be cut.
        learnt_positions: the longest input, where each position has an embedding that was learnt;
            None where any input can be read.
    """

    class_name: str
    decoder: str
    blocks: str
    block_count: int
    units: tuple[FFNUnit, ...]
    refused: tuple[Refusal, ...] = field(default=())
    learnt_positions: int | None = None

    @property
    def has_experts(self) -> bool:
        """Whether there are routed experts."""
        return any(unit.routed for unit in self.units)

    @property
    def widths(self) -> list[int]:
        """The width of every unit."""
        return [unit.width for unit in self.units]

    def with_widths(self, widths: Sequence[int]) -> Architecture:
        """Return the same architecture with other numbers of channels."""
        units = zip(self.units, widths, strict=True)
        return replace(self, units=tuple(replace(unit, width=width) for unit, width in units))

    def units_of(self, block: int) -> tuple[FFNUnit, ...]:
        """Return the FFN units of one block."""
        return tuple(unit for unit in self.units if unit.block == block)

    def module_name(self, unit: FFNUnit) -> str:
        """Return the dotted path from the model to the module of a unit."""
        return f"{self.block_prefix(unit.block)}{unit.path}".removesuffix(".")

    def block_prefix(self, block: int) -> str:
        """Return what the names of all parameters of one block begin with."""
        return f"{self.blocks}.{block}."

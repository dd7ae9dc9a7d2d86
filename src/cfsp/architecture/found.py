"""What a model is made of, as cfsp sees it: blocks, and in each the units that can get narrower.

    Architecture
      blocks        "model.layers"
      units         Unit(block 0, "mlp", 1536 channels)
                    Unit(block 1, "self_attn", 3 channels, part "kv")
                    Unit(block 1, "mlp.experts", 768 channels in each of 64 FFNs)
                    Unit(block 1, "mlp.shared_expert", 1536 channels)

The channels of an attention are its KV groups: a head of keys and values with the query heads that
read it. It is found in the model (`cfsp.architecture.discovery`), not looked up by the model's
type, and proved by execution (`cfsp.architecture.proof`).

Shapes: E experts, F FFN channels, G KV groups, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from cfsp.architecture.resizing import resize_attention, resize_ffn
from cfsp.settings import Part

# How gate and up share one matrix: all rows of the gate first, or row about row.
HALVES, INTERLEAVED = (1, 1), (2,)

# A number that a module keeps of its own size, such as `in_features`: the module's dotted path from
# the block, the number's name, and how often the width it is.
WidthAttribute = tuple[str, str, int]


@dataclass(frozen=True)
class ChannelAxis:
    """Where a parameter has the channels of its unit."""

    axis: int
    # The axis has that many sections one after the other, and in each a channel has so many entries
    # side by side: (64,) of keys with a head size of 64, (192, 64, 64) of three query heads, keys
    # and values in one matrix.
    spans: tuple[int, ...] = (1,)

    @property
    def entries(self) -> int:
        """How many entries of the axis each channel has."""
        return sum(self.spans)

    def width(self, shape: Sequence[int]) -> int:
        """Return the number of channels of a tensor of this shape."""
        return shape[self.axis] // self.entries

    def index(self, kept_K: Tensor, width: int) -> Tensor:
        """Return the places on the axis of some channels, of `width` in all."""
        places, start = [], 0
        for span in self.spans:
            within = torch.arange(span, device=kept_K.device)
            places.append((start + kept_K[:, None] * span + within).flatten())
            start += width * span
        return torch.cat(places)

    def select(self, tensor: Tensor, kept: Sequence[int]) -> Tensor:
        """Return the tensor with the kept channels only."""
        kept_K = torch.tensor(kept, dtype=torch.long, device=tensor.device)
        return tensor.index_select(self.axis, self.index(kept_K, self.width(tensor.shape)))


@dataclass(frozen=True)
class Unit:
    """The FFNs of a block that share a width (a dense one, or all routed experts), or an attention.

    Parameters and modules are named by their dotted paths from the block.
    """

    block: int
    path: str  # of its module; empty if the block itself holds the FFN
    width: int  # channels of each FFN; KV groups of an attention
    ffns: int  # 1, or the number of experts
    up: str  # the parameter whose outputs are channels; of an attention that of the queries
    gate: str | None  # the same as `up` where they are one matrix; None without a gate
    down: str  # the parameter whose inputs are channels; of an attention its output matrix
    axes: dict[str, ChannelAxis]  # of parameters with channels; of experts the first axis is theirs
    attributes: tuple[WidthAttribute, ...] = ()
    routed: bool = False  # whether its FFNs are experts that a router chooses among
    part: Part = "ffn"
    # Numbers of heads that an attention reads in its config while it runs, each in `width`s.
    config_numbers: dict[str, int] = field(default_factory=dict)
    after: str | None = None  # the module that the hidden state after an attention enters, if any
    # How many values an attention returns besides its output; None if it returns a tensor.
    extras: int | None = None
    # What else has the axis of experts, such as the router's rows, and which it is; where whole
    # experts can go.
    expert_axes: dict[str, int] = field(default_factory=dict)

    @property
    def removable_experts(self) -> int:
        """Number of its experts that were proved to be able to go whole; 0 if none was."""
        return self.ffns if self.expert_axes else 0

    @property
    def head_size(self) -> int:
        """How many keys, or values, each KV group has; 1 of an attention that goes as one."""
        others = [axis for name, axis in self.axes.items() if name.endswith("weight")]
        queries, output = self.axes.get(self.up), self.axes[self.down]
        of_keys = (a for a in others if a is not output and (a is not queries or len(a.spans) > 1))
        return max((axis.spans[-1] for axis in of_keys), default=1)

    @property
    def columns(self) -> int:
        """How many inputs the matrix `down` of each FFN has: one or several for each channel."""
        return self.width * self.axes[self.down].entries

    def columns_of(self, channels: Sequence[int]) -> list[int]:
        """Return the inputs of `down` that some channels of one FFN have."""
        channels_K = torch.tensor(channels, dtype=torch.long)  # there may be none
        return self.axes[self.down].index(channels_K, self.width).tolist()

    @property
    def is_whole(self) -> bool:
        """Whether it is an attention that stays or goes as one."""
        return self.part == "kv" and set(self.axes) == {self.down}

    @property
    def kind(self) -> tuple[object, ...]:
        """All but the place: units of a kind are proved once."""
        return (self.width, self.ffns, tuple(self.axes.items()), self.attributes, *self.form)

    @property
    def form(self) -> tuple[object, ...]:
        """The kind without its numbers: what a smaller model of the same class has in common."""
        axes = ((name, axis.axis, len(axis.spans)) for name, axis in self.axes.items())
        numbers = ((module, name) for module, name, _ in self.attributes)
        paths = self.path, self.up, self.gate, self.down
        return (*paths, self.routed, tuple(axes), tuple(numbers))

    @property
    def plain_axes(self) -> dict[str, tuple[int, int]]:
        """The axes as plain numbers, as `resize_ffn` and config.json have them."""
        return {name: (axis.axis, axis.entries) for name, axis in self.axes.items()}

    def resize(self, block: nn.Module, width: int) -> None:
        """Give the unit of a block another width, as the modelling file does it."""
        sizes = self.plain_axes, self.attributes
        if self.part == "kv":
            resize_attention(block, self.path, width, *sizes, self.config_numbers)
        else:
            resize_ffn(block, width, *sizes)

    def select(self, name: str, parameter: Tensor, kept_EK: Sequence[Sequence[int]]) -> Tensor:
        """Return one of its parameters with the kept channels of each FFN, without FFNs of none."""
        axis = self.axes[name]
        if not self.routed:
            return axis.select(parameter, kept_EK[0])
        staying = [expert for expert, kept_K in enumerate(kept_EK) if kept_K]
        shape = list(parameter.shape)
        shape[0], shape[axis.axis] = len(staying), axis.entries * len(kept_EK[staying[0]])
        selected, of_one = parameter.new_empty(shape), replace(axis, axis=axis.axis - 1)
        for index, expert in enumerate(staying):
            selected[index] = of_one.select(parameter[expert], kept_EK[expert])
        return selected

    def readings(self) -> Iterator[Unit]:
        """Yield what it may be, of which the proof takes the first that passes."""
        # A hidden size may be as large as all heads by chance, and some classes compute with it.
        by_chance = (self.path, "hidden_size") if self.part == "kv" else None
        for each in filter(None, (self, self.other_fusion())):
            others = tuple(number for number in each.attributes if number[:2] != by_chance)
            if others != each.attributes:
                yield replace(each, attributes=others)
            yield each

    def other_fusion(self) -> Unit | None:
        """Return the same unit with its shared matrix shared in the other way, if it has one."""
        if self.gate != self.up and all(len(axis.spans) == 1 for axis in self.axes.values()):
            return None
        # Of heads each one's lie side by side.
        other = {HALVES: INTERLEAVED, INTERLEAVED: HALVES} if self.part == "ffn" else {}
        axes = {
            name: replace(axis, spans=other.get(axis.spans, (axis.entries,)))
            for name, axis in self.axes.items()
        }
        return replace(self, axes=axes)

    def as_proved(self, proved: Unit) -> Unit:
        """Return the same unit as what one of its form was proved to be."""
        if proved.is_whole:
            found = self.whole()
        else:
            numbers = {number[:2] for number in proved.attributes}
            is_fused_so = len(self.axes[self.up].spans) == len(proved.axes[proved.up].spans)
            found = replace(
                self if is_fused_so else self.other_fusion() or self,
                attributes=tuple(each for each in self.attributes if each[:2] in numbers),
            )
        return replace(found, after=proved.after, extras=proved.extras)

    def whole(self) -> Unit:
        """Return the same attention as one that stays or goes, whatever its heads are."""
        axes = {self.down: replace(self.axes[self.down], spans=(self.columns,))}
        return replace(self, width=1, axes=axes, attributes=(), config_numbers={})


@dataclass(frozen=True)
class Refusal:
    """Why a module that looks like an FFN or an attention is none whose channels can be cut."""

    module: str  # dotted path in the model
    reason: str


@dataclass(frozen=True)
class RoutedExperts:
    """How a model says how many routed experts its blocks have, where whole ones can go."""

    key: str  # of the text config
    count: int  # of each block
    # Of so many, one after the other, the router chooses the best first: equally many of each must
    # stay.
    groups: int = 1


@dataclass(frozen=True)
class Architecture:
    """The blocks of a model and their units, of the parts that are asked for.

    Modules are named by their dotted paths from the model.
    """

    class_name: str  # of transformers
    decoder: str  # the text decoder, which takes token ids and whose forward calls the blocks
    blocks: str  # the list of blocks
    block_count: int
    units: tuple[Unit, ...]  # in the order of blocks, and within a block as they are registered
    refused: tuple[Refusal, ...] = ()
    gone: tuple[Unit, ...] = ()  # attention layers of the stock model that have no KV group left
    experts: RoutedExperts | None = None  # where whole ones can go and were asked for

    @property
    def stock_units(self) -> tuple[Unit, ...]:
        """The units of the model with all attention layers; those that are gone have no width."""
        return tuple(sorted((*self.gone, *self.units), key=lambda unit: unit.block))

    @property
    def has_experts(self) -> bool:
        """Whether there are routed experts."""
        return any(unit.routed for unit in self.units)

    @property
    def has_attentions(self) -> bool:
        """Whether there are attention layers that can lose KV groups."""
        return any(unit.part == "kv" for unit in self.units)

    @property
    def widths(self) -> list[int]:
        """The width of every unit."""
        return [unit.width for unit in self.units]

    def with_widths(self, widths: Sequence[int]) -> Architecture:
        """Return the same with other widths; attention layers without KV groups are gone."""
        units = [replace(unit, width=width) for unit, width in zip(self.units, widths, strict=True)]
        return replace(
            self,
            units=tuple(unit for unit in units if unit.width),
            gone=(*self.gone, *(unit for unit in units if not unit.width)),
        )

    def with_experts(self, count: int) -> Architecture:
        """Return the same architecture with another number of routed experts in its blocks."""
        assert self.experts is not None
        units = tuple(
            replace(unit, ffns=count) if unit.expert_axes else unit for unit in self.units
        )
        return replace(self, units=units, experts=replace(self.experts, count=count))

    def of_part(self, part: Part) -> Architecture:
        """Return the same architecture with the units of one part only."""

        def of(units: Sequence[Unit]) -> tuple[Unit, ...]:
            return tuple(unit for unit in units if unit.part == part)

        return replace(self, units=of(self.units), gone=of(self.gone))

    def without_blocks(self, removed: Collection[int]) -> Architecture:
        """Return the architecture of the model without some blocks; the others move up."""
        kept = [block for block in range(self.block_count) if block not in removed]

        def of_kept(units: Sequence[Unit]) -> tuple[Unit, ...]:
            staying = (unit for unit in units if unit.block in kept)
            return tuple(replace(unit, block=kept.index(unit.block)) for unit in staying)

        units, gone = of_kept(self.units), of_kept(self.gone)
        return replace(self, block_count=len(kept), units=units, gone=gone, refused=())

    def units_of(self, block: int) -> tuple[Unit, ...]:
        """Return the units of one block."""
        return tuple(unit for unit in self.units if unit.block == block)

    def module_name(self, unit: Unit) -> str:
        """Return the dotted path from the model to the module of a unit."""
        return f"{self.block_prefix(unit.block)}{unit.path}".removesuffix(".")

    def block_of(self, name: str) -> int | None:
        """Return the block whose number is in a parameter's name, be it one too many, if any."""
        found = re.match(rf"{re.escape(self.blocks)}\.(\d+)\.", name)
        return None if found is None else int(found[1])

    def block_prefix(self, block: int) -> str:
        """Return what the names of all parameters of one block begin with."""
        return f"{self.blocks}.{block}."

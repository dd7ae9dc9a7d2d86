"""Where stored tensors keep FFN channels; of converted ones found by watching the conversion.

Small stand-ins of the stored tensors get a number for every entry. transformers' own converter
makes the parameter of them. In the parameter it is known which channel an entry belongs to, and
its number tells where it came from.

    stored    experts.0.w1  [[ 0,  1], [ 2,  3], [ 4,  5]]     3 channels, 2 hidden
              experts.0.w3  [[ 6,  7], [ 8,  9], [10, 11]]
    in memory gate_up_proj  [[[0, 1], [2, 3], ..., [10, 11]]]  rows are gate 0, 1, 2, up 0, 1, 2
    so        w1 has the channels of the gate along its rows, w3 those of up

Shapes: D hidden, E experts, F channels, N entries of all stand-ins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cfsp.architecture.found import Architecture, ChannelAxis, Fusion, Unit
from cfsp.checkpoint.conversion import Conversion, ModelShapes, convert
from cfsp.checkpoint.stored_layout import ChannelLayout, Role
from cfsp.checkpoint.tensor_file import TensorSpec
from cfsp.errors import UnsupportedModelError

_GATE, _UP, _DOWN = range(3)
_ROLES: tuple[Role, ...] = ("gate", "up", "down")
_NONE = -1


@dataclass(frozen=True)
class ChannelParameter:
    """A parameter in memory that has a channel axis.

    Attributes:
        index: of its unit in the architecture.
        unit: its unit.
        name: its dotted path from the block.
        axes: how many axes it has.
    """

    index: int
    unit: Unit
    name: str
    axes: int

    @property
    def matrix_axes(self) -> int:
        """How many axes it has of one FFN: 2 of a matrix, 1 of a bias."""
        return self.axes - self.unit.routed

    @property
    def axis(self) -> ChannelAxis:
        """Where it has the channels."""
        return self.unit.axes[self.name]

    @property
    def role(self) -> Role:
        """Which matrix it is, or whose bias."""
        if self.name == self.unit.down:
            return "down"
        if self.unit.part == "kv":
            return "input"
        if self.axis.fusion is not None:
            return "both"
        return "gate" if self.unit.gate is not None and self._is_of(self.unit.gate) else "up"

    def _is_of(self, matrix: str) -> bool:
        stem = matrix.removesuffix(".weight")
        return self.name in (matrix, f"{stem}.bias", f"{stem}_bias", f"{matrix}_bias")

    @property
    def layout(self) -> ChannelLayout:
        """The layout of a stored tensor that is the parameter."""
        last = self.axis.axis == self.axes - 1
        return ChannelLayout(
            unit=self.index,
            role=self.role,
            axis=self.axis,
            ffn=None if self.unit.routed else 0,
            is_bias=self.matrix_axes == 1,
            transposed=self.matrix_axes == 2 and last != (self.role == "down"),
        )


def channel_parameters(
    architecture: Architecture, shapes: ModelShapes
) -> dict[str, ChannelParameter]:
    """Return the parameters of a model that have channels, by name."""
    found = {}
    for index, unit in enumerate(architecture.units):
        for name in unit.axes:
            full_name = architecture.block_prefix(unit.block) + name
            axes = shapes.tensors[full_name].ndim
            found[full_name] = ChannelParameter(index, unit, name, axes)
    return found


def layouts_of(
    conversions: Sequence[Conversion],
    specs: Mapping[str, TensorSpec],
    parameters: Mapping[str, ChannelParameter],
    made_by: Mapping[str, Conversion],
    shapes: ModelShapes,
) -> dict[str, ChannelLayout]:
    """Return the layouts of all stored tensors that have channels."""
    made: dict[int, dict[str, ChannelParameter]] = {}
    for name, parameter in parameters.items():
        made.setdefault(id(made_by[name]), {})[name] = parameter
    layouts: dict[str, ChannelLayout] = {}
    # Of converted tensors of a kind, from one block and one unit to the next.
    traced: dict[object, list[ChannelLayout | None]] = {}
    for conversion in conversions:
        targets = made.get(id(conversion))
        if targets is None:
            continue
        if conversion.converter is None:
            layouts[conversion.stored[0]] = targets[conversion.target].layout
            continue
        kind = (
            id(conversion.converter),
            tuple((pattern, tuple(specs[name].shape for name in names))
                  for pattern, names in conversion.sources.items()),
            tuple((target.name, target.unit.kind) for target in targets.values()),
        )  # fmt: skip
        units = list(dict.fromkeys(target.index for target in targets.values()))
        if kind not in traced:
            first = {
                name: replace(target, index=units.index(target.index))
                for name, target in targets.items()
            }
            traced[kind] = _trace(conversion, specs, first, shapes)
        for name, layout in zip(conversion.stored, traced[kind], strict=True):
            if layout is not None:
                layouts[name] = replace(layout, unit=units[layout.unit])
    return layouts


def _trace(
    conversion: Conversion,
    specs: Mapping[str, TensorSpec],
    parameters: Mapping[str, ChannelParameter],
    shapes: ModelShapes,
) -> list[ChannelLayout | None]:
    """Return the layout of each stored tensor of a conversion; None of one without channels.

    Args:
        conversion: one with a converter.
        specs: of the stored tensors.
        parameters: those that it makes and that have channels, by their names.
        shapes: of the model.

    Raises:
        UnsupportedModelError: the channels of a stored tensor are not along one axis.
    """
    if any(parameter.unit.part == "kv" for parameter in parameters.values()):
        raise UnsupportedModelError(
            f"{conversion.stored[0]} of an attention is converted when it is loaded, and cfsp "
            "cannot tell where it has its heads; prune the model without the part kv"
        )
    small = _small_lengths(parameters, shapes)
    stand_ins, count_N = {}, 0
    for name in conversion.stored:
        shape = [small.get(length, length) for length in specs[name].shape]
        end = count_N + math.prod(shape)
        stand_ins[name] = torch.arange(count_N, end).view(shape)
        count_N = end
    small_shapes = {
        name: torch.empty([small.get(length, length) for length in tensor.shape], device="meta")
        for name, tensor in shapes.tensors.items()
    }
    try:
        made = convert(conversion, stand_ins, ModelShapes(shapes.config, small_shapes))
    except Exception as error:  # whatever a converter says to shapes that it did not expect
        raise _unsupported(conversion.stored[0], "is converted in no small copy") from error
    # Of every entry: its unit, part (gate, up or down), channel, expert and place along hidden.
    labels_5N = torch.full((5, count_N), _NONE, dtype=torch.int32)
    for name, parameter in parameters.items():
        numbers_N = made[name].flatten()
        if made[name].shape != small_shapes[name].shape or numbers_N.bincount().max() > 1:
            raise _unsupported(conversion.stored[0], f"does not become {name} entry by entry")
        labels_5N[:, numbers_N] = _labels(made[name].shape, parameter).flatten(1)
    layouts: list[ChannelLayout | None] = []
    start = 0
    for name, stand_in in stand_ins.items():
        end = start + stand_in.numel()
        labels = labels_5N[:, start:end].view(5, *stand_in.shape)
        start = end
        layouts.append(
            None if (labels == _NONE).all() else _layout(name, labels, parameters, small)
        )
    return layouts


def _small_lengths(
    parameters: Mapping[str, ChannelParameter], shapes: ModelShapes
) -> dict[int, int]:
    """Return a small length for each length in the parameters; equal ones stay equal.

    Some converters compare shapes, so lengths that differ must not become equal either. The
    number of experts stays: it is how many tensors there are.
    """
    units = [parameter.unit for parameter in parameters.values()]
    small = {unit.ffns: unit.ffns for unit in units if unit.routed}
    taken = {n for length in small.values() for n in (length, length // 2)}
    free = (prime for prime in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31) if prime not in taken)
    for width in sorted({unit.width for unit in units}):
        if width not in small:
            small[width] = small[2 * width] // 2 if 2 * width in small else next(free)
        small.setdefault(2 * width, 2 * small[width])
    for name in parameters:
        for length in shapes.tensors[name].shape:
            if length not in small:
                small[length] = next(free)
    return small


def _labels(shape: Sequence[int], parameter: ChannelParameter) -> Tensor:
    """Return unit, part, channel, expert and place along hidden of each entry of a parameter."""

    def along(axis: int, values: Tensor) -> Tensor:
        return values.view([-1 if a == axis else 1 for a in range(len(shape))]).expand(*shape)

    axis = parameter.axis
    parts = (_GATE, _UP) if axis.fusion else (_ROLES.index(parameter.role),)
    channels, parts_of_channels = _line(axis.fusion, axis.width(shape), parts)
    expert = place = torch.zeros(tuple(shape), dtype=torch.int32)
    for other, length in enumerate(shape):
        if other == 0 and parameter.unit.routed:
            expert = along(0, _count(length))
        elif other != axis.axis:
            place = place * length + along(other, _count(length))
    unit = torch.full_like(place, parameter.index)
    of_channels = along(axis.axis, parts_of_channels), along(axis.axis, channels)
    return torch.stack([unit, *of_channels, expert, place])


def _count(length: int) -> Tensor:
    return torch.arange(length, dtype=torch.int32)


def _line(fusion: Fusion | None, width: int, parts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the channels along an axis, and the part that each is of."""
    channels, each = _count(width), torch.tensor(parts, dtype=torch.int32)
    if fusion == "interleaved":
        return channels.repeat_interleave(len(parts)), each.repeat(width)
    return channels.repeat(len(parts)), each.repeat_interleave(width)


def _layout(
    name: str,
    labels: Tensor,
    parameters: Mapping[str, ChannelParameter],
    small: Mapping[int, int],
) -> ChannelLayout:
    """Return the layout of a stored tensor whose entries have these labels."""
    units, parts, channels, experts, places = labels
    index = int(units.flatten()[0])
    if (units != index).any():
        raise _unsupported(name, "holds more than the channels of one FFN unit")
    parameter = next(p for p in parameters.values() if p.index == index)
    holds_all = channels.ndim == parameter.matrix_axes + 1
    if channels.ndim != parameter.matrix_axes + holds_all or (
        holds_all and len(channels) != small.get(parameter.unit.ffns)
    ):
        raise _unsupported(name, f"has the lengths {list(channels.shape)} in a small copy")
    ffn = None if holds_all else int(experts.flatten()[0])
    along_experts = _along(experts, 0)
    in_order = along_experts is not None and torch.equal(along_experts, _count(len(experts)))
    if not (in_order if ffn is None else experts.eq(ffn).all()):
        raise _unsupported(name, "mixes experts")
    code = channels * len(_ROLES) + parts
    for axis in range(holds_all, code.ndim):
        line = _along(code, axis)
        found = None if line is None else _match(line, small[parameter.unit.width])
        if found is not None:
            break
    else:
        raise _unsupported(name, "has no axis that they lie along in order")
    fusion, order = found
    role: Role = "both" if fusion else _ROLES[order[0]]
    for other in range(holds_all, code.ndim):
        if other != axis:
            hidden = _along(places, other)
            if hidden is None or not torch.equal(hidden, _count(len(hidden))):
                raise _unsupported(name, "has the hidden size in another order than in memory")
    last = axis == code.ndim - 1
    return ChannelLayout(
        unit=index,
        role=role,
        axis=ChannelAxis(axis, fusion),
        ffn=ffn,
        is_bias=parameter.matrix_axes == 1,
        transposed=parameter.matrix_axes == 2 and last != (role == "down"),
        up_first=order == (_UP, _GATE),
    )


def _along(labels: Tensor, axis: int) -> Tensor | None:
    """Return the labels along an axis; None if they differ along others."""
    lines = labels.movedim(axis, 0).reshape(labels.shape[axis], -1)
    return lines[:, 0] if lines.eq(lines[:, :1]).all() else None


def _match(line: Tensor, width: int) -> tuple[Fusion | None, tuple[int, ...]] | None:
    """Return how gate and up share an axis, and in which order; None if it is no such axis.

    Args:
        line: the channel and part of each entry along the axis, in one number.
        width: how many channels there are.
    """
    orders: dict[Fusion | None, tuple[tuple[int, ...], ...]] = {
        None: ((_GATE,), (_UP,), (_DOWN,)),
        "halves": ((_GATE, _UP), (_UP, _GATE)),
        "interleaved": ((_GATE, _UP), (_UP, _GATE)),
    }
    for fusion, choices in orders.items():
        for order in choices:
            channels, parts = _line(fusion, width, order)
            if torch.equal(channels * len(_ROLES) + parts, line):
                return fusion, order
    return None


def _unsupported(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"cannot tell where the stored tensor {name} has its FFN channels: it {why}; "
        "please report the model type"
    )

"""The arithmetic of quantised weights: from the tensors that one is stored as to its values.

Each function is a format: it takes these parts, of which nothing is read yet, and the dtype of the
plain tensor that it returns, of which nothing is computed yet. Values are computed in float32 and
rounded once.

Shapes: E experts, O outputs, I inputs, G groups of inputs, R rows of the first axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from cfsp.checkpoint.tensor_file import AGAIN, FileTensor, TensorSpec, tensor_chunks
from cfsp.errors import CheckpointError

# The parts of a weight, by what their names end with.
Parts = Mapping[str, FileTensor]

# FP4 (E2M1): a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# In float32, and with what is computed on the way, some 300 MB.
_VALUES_AT_ONCE = 1 << 24


class ImpossiblePartsError(Exception):
    """The parts do not fit each other; says what was expected and found."""


@dataclass(frozen=True)
class DequantisedTensor:
    """A tensor that is computed, when it is asked for, from the tensors that it is stored as."""

    spec: TensorSpec
    rows: Callable[[int, int], Tensor]  # in float32, from one of the first axis to another

    def read(self) -> Tensor:
        """Return the tensor."""
        whole = torch.empty(self.spec.shape, dtype=self.spec.dtype)
        for start, stop in self._pieces():
            whole[start:stop] = self.rows(start, stop)
        return whole

    def read_part(self, start: int, stop: int) -> Tensor:
        """Return the elements from one to another, flattened; only their rows are computed."""
        in_a_row = max(1, self.spec.elements // max(1, self.spec.shape[0]))
        first = start // in_a_row
        rows = self.rows(first, ceil(stop / in_a_row)).reshape(-1)
        return rows[start - first * in_a_row : stop - first * in_a_row].to(self.spec.dtype)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the raw bytes, some rows at a time."""
        for start, stop in self._pieces():
            yield from tensor_chunks(self.rows(start, stop).to(self.spec.dtype))

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Yield where the rows begin and end that are computed at once."""
        count = self.spec.shape[0]
        step = max(1, _VALUES_AT_ONCE * count // max(1, self.spec.elements))
        for start in range(0, count, step):
            yield start, min(start + step, count)


# A tensor of a checkpoint; nothing is read before it is asked for.
StoredTensor = FileTensor | DequantisedTensor


def from_mxfp4(parts: Parts, dtype: torch.dtype) -> DequantisedTensor:
    """Return experts that are stored as pairs of FP4 numbers, 32 with a common exponent.

    Stored outputs x inputs, they are inputs x outputs in memory, as in gpt-oss: from E x O x G x 16
    bytes and E x O x G exponents to E x I x O.
    """
    blocks, scales = parts["_blocks"], parts["_scales"]
    shape = blocks.spec.shape
    if len(shape) != 4 or shape[-1] != 16:
        raise _impossible(blocks, "experts x outputs x groups x 16")
    if scales.spec.shape != shape[:-1] or scales.spec.dtype != torch.uint8:
        raise _impossible(scales, f"bytes of shape {list(shape[:-1])}")
    of_byte = torch.tensor([[_FP4[byte & 15], _FP4[byte >> 4]] for byte in range(256)])

    def rows(start: int, stop: int) -> Tensor:
        values = of_byte[blocks.rows(start, stop).int()].flatten(-2)
        values *= _scales(scales.rows(start, stop))[..., None]
        return values.flatten(-2).transpose(1, 2)

    experts, outputs, groups, _ = shape
    return DequantisedTensor(TensorSpec(dtype, (experts, groups * 32, outputs)), rows)


def from_scaled(
    parts: Parts, dtype: torch.dtype, *, scale: str, block: tuple[int, int]
) -> DequantisedTensor:
    """Return numbers of 8 bits, of any shape, each times the scale of its block.

    The scale is one, one for each row, or one for each block (height and width) of the last two
    axes; bytes are exponents. A zero point of its shape is subtracted before.
    """
    values, scales, zero_point = parts[""], parts[scale], parts.get("_zero_point")
    shape = values.spec.shape
    sizes = (*(1,) * (len(shape) - 2), *block)[-len(shape) :]  # of a block along every axis
    for part in (scales, *([zero_point] if zero_point else [])):
        grid = _grid(part.spec.shape, len(shape))
        if len(grid) != len(shape) or any(
            length not in (1, count, ceil(count / size))
            for length, count, size in zip(grid, shape, sizes, strict=True)
        ):
            raise _impossible(part, f"one number, one a row, or one a block of {list(block)}")

    def of_rows(part: Tensor, start: int, stop: int) -> Tensor:
        """Return the part's value for every number in some rows; broadcast where that is one."""
        part = part.reshape(_grid(tuple(part.shape), len(shape)))
        for axis, (count, size) in enumerate(zip(shape, sizes, strict=True)):
            if part.shape[axis] > 1:
                index = torch.arange(start, stop) if axis == 0 else torch.arange(count)
                index = index if part.shape[axis] == count else index // size
                part = part.index_select(axis, index)
        return part

    def rows(start: int, stop: int) -> Tensor:
        numbers = values.rows(start, stop).float()
        if zero_point is not None:
            numbers -= of_rows(zero_point.read().float(), start, stop)
        return numbers.mul_(of_rows(_scales(scales.read()), start, stop))

    return DequantisedTensor(TensorSpec(dtype, shape), rows)


def from_groups(
    parts: Parts, dtype: torch.dtype, *, bits: int, group_size: int
) -> DequantisedTensor:
    """Return a matrix O x I of few bits, less the zero of its group of inputs, times its scale.

    Several neighbours are in an integer, the first in the lowest bits. Scales are O x G. Zeros are
    packed along the outputs; without them half of what there is is subtracted. A group is of so
    many inputs that are neighbours (of all where -1), unless the group of each is stored.
    """
    packed, scale = parts["weight_packed"], parts["weight_scale"]
    zero, group = parts.get("weight_zero_point"), parts.get("weight_g_idx")
    in_a_word = 32 // bits
    if len(packed.spec.shape) != 2:
        raise _impossible(packed, "a matrix")
    outputs, inputs = packed.spec.shape[0], packed.spec.shape[1] * in_a_word
    groups = 1 if group_size < 0 else ceil(inputs / group_size)
    expected = (
        (scale, (outputs, groups)),
        (zero, (ceil(outputs / in_a_word), groups)),
        (group, (inputs,)),
    )
    for part, shape in expected:
        if part is not None and part.spec.shape != shape:
            raise _impossible(part, f"shape {list(shape)}")

    def unpacked(words: Tensor, axis: int) -> Tensor:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        numbers = words.unsqueeze(axis + 1) >> (shifts[:, None] if axis == 0 else shifts)
        return (numbers & ((1 << bits) - 1)).flatten(axis, axis + 1).float()

    def rows(start: int, stop: int) -> Tensor:
        group_I = torch.arange(inputs) // (group_size if group_size > 0 else inputs)
        group_I = group_I if group is None else _read_groups(group, groups)
        values_RI = unpacked(packed.rows(start, stop), 1)
        if zero is None:
            values_RI -= 1 << (bits - 1)
        else:
            first = start // in_a_word
            zeros_OG = unpacked(zero.rows(first, ceil(stop / in_a_word)), 0)
            before = first * in_a_word
            values_RI -= zeros_OG[start - before : stop - before, group_I]
        return values_RI.mul_(scale.rows(start, stop).float()[:, group_I])

    return DequantisedTensor(TensorSpec(dtype, (outputs, inputs)), rows)


def _read_groups(group_of_input: FileTensor, groups: int) -> Tensor:
    """Return the group of every input, which must be there."""
    found = group_of_input.read().long()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise CheckpointError(
            f"{group_of_input.path}: {group_of_input.name} has groups {int(found.min())} "
            f"to {int(found.max())}, expected 0 to {groups - 1}; {AGAIN}"
        )
    return found


def _scales(data: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two, which exp2 need not give exactly."""
    return data.view(torch.float8_e8m0fnu).float() if data.dtype == torch.uint8 else data.float()


def _grid(scale: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Return the shape of a scale with as many axes as its tensor has."""
    if all(length == 1 for length in scale):
        return (1,) * axes
    return (*scale, *(1,) * (axes - len(scale)))


def _impossible(part: FileTensor, expected: str) -> ImpossiblePartsError:
    dtype = str(part.spec.dtype).removeprefix("torch.")
    shape = list(part.spec.shape)
    return ImpossiblePartsError(f"{part.name} is {dtype} of shape {shape}, expected {expected}")

"""The arithmetic of quantised weights: from the tensors that one is stored as to its values.

Each function takes these parts, of which nothing is read yet, and returns the plain tensor, of
which nothing is computed yet. Values are computed in float32 and rounded once.

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
    """A tensor that is computed, when it is asked for, from the tensors that it is stored as.

    `rows` gives its values, in float32, from one row of the first axis to another.
    """

    spec: TensorSpec
    rows: Callable[[int, int], Tensor]

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


def from_mxfp4(blocks: FileTensor, scales: FileTensor, dtype: torch.dtype) -> DequantisedTensor:
    """Return experts that are stored as pairs of FP4 numbers, 32 with a common exponent.

    Stored outputs x inputs, they are inputs x outputs in memory, as in gpt-oss: from E x O x G x 16
    bytes and E x O x G exponents to E x I x O.
    """
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
    values: FileTensor,
    scale: FileTensor,
    zero_point: FileTensor | None,
    block: tuple[int, int],
    dtype: torch.dtype,
) -> DequantisedTensor:
    """Return numbers of 8 bits, of any shape, each times the scale of its block.

    The scale is one, one for each row, or one for each block (height and width) of the last two
    axes; bytes are exponents. A zero point of its shape is subtracted before.
    """
    shape = values.spec.shape
    sizes = (*(1,) * (len(shape) - 2), *block)[-len(shape) :]  # of a block along every axis
    for part in (scale, *([zero_point] if zero_point else [])):
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
        return numbers.mul_(of_rows(_scales(scale.read()), start, stop))

    return DequantisedTensor(TensorSpec(dtype, shape), rows)


@dataclass(frozen=True)
class Grouping:
    """How numbers of few bits are stored, several in an integer, with scales for groups of inputs.

    Attributes:
        packed: what the name of the numbers ends with, outputs x inputs.
        scale: the same of the scales, outputs x groups.
        zero: of what is subtracted before, packed along the outputs; half of what there is if not
            stored.
        group: of the group of each input; those of neighbours if not stored.
        bits: of a number; divides 32.
        group_size: inputs of a group; -1 for all.
        added: what the stored zero lacks.
        inputs_first: all matrices are stored the other way round.
        along_outputs: outputs share an integer, not inputs.
        order: which place in an integer each neighbour has; one after the other if empty.
    """

    packed: str
    scale: str
    zero: str
    group: str
    bits: int = 4
    group_size: int = -1
    added: int = 0
    inputs_first: bool = False
    along_outputs: bool = False
    order: tuple[int, ...] = ()


def from_groups(parts: Parts, how: Grouping, dtype: torch.dtype) -> DequantisedTensor:
    """Return numbers of few bits, outputs x inputs, less their zero and times their scale."""
    packed, scale = parts[how.packed], parts[how.scale]
    zero, group = parts.get(how.zero), parts.get(how.group)
    in_a_word = 32 // how.bits
    if len(packed.spec.shape) != 2:
        raise _impossible(packed, "a matrix")
    outputs, inputs = packed.spec.shape[:: -1 if how.inputs_first else 1]
    outputs *= in_a_word if how.along_outputs else 1
    inputs *= 1 if how.along_outputs else in_a_word
    groups = 1 if how.group_size < 0 else ceil(inputs / how.group_size)
    grids = [
        (part, (groups, length) if how.inputs_first else (length, groups))
        for part, length in ((scale, outputs), (zero, ceil(outputs / in_a_word)))
    ]
    for part, shape in (*grids, (group, (inputs,))):
        if part is not None and part.spec.shape != shape:
            raise _impossible(part, f"shape {list(shape)}")

    def of_outputs(part: FileTensor, chosen: slice) -> Tensor:
        if how.inputs_first:
            return part.read()[:, chosen].T
        return part.rows(chosen.start, chosen.stop)

    def rows(start: int, stop: int) -> Tensor:
        group_I = _groups(group, inputs, how.group_size, groups)
        words = slice(start // in_a_word, ceil(stop / in_a_word))
        chosen = slice(start - words.start * in_a_word, stop - words.start * in_a_word)
        if how.along_outputs:
            values_RI = _unpacked(of_outputs(packed, words), 0, how)[chosen].float()
        else:
            values_RI = _unpacked(of_outputs(packed, slice(start, stop)), 1, how).float()
        if zero is None:
            values_RI -= 1 << (how.bits - 1)
        else:
            zeros_RG = _unpacked(of_outputs(zero, words), 0, how)[chosen].float() + how.added
            values_RI -= zeros_RG[:, group_I]
        return values_RI.mul_(of_outputs(scale, slice(start, stop)).float()[:, group_I])

    return DequantisedTensor(TensorSpec(dtype, (outputs, inputs)), rows)


def _unpacked(words: Tensor, axis: int, how: Grouping) -> Tensor:
    """Return the numbers in the integers of a matrix, the lowest bits of each first."""
    shifts = torch.arange(0, 32, how.bits, dtype=torch.int32)
    shifts = shifts[list(how.order)] if how.order else shifts
    parts = words.unsqueeze(axis + 1) >> (shifts[:, None] if axis == 0 else shifts)
    return (parts & ((1 << how.bits) - 1)).flatten(axis, axis + 1)


def _groups(group_of_input: FileTensor | None, inputs: int, group_size: int, groups: int) -> Tensor:
    """Return the group of every input, which must be there."""
    if group_of_input is None:
        return torch.arange(inputs) // (group_size if group_size > 0 else inputs)
    found = group_of_input.read().long()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise CheckpointError(
            f"{group_of_input.file.path}: {group_of_input.name} has groups {int(found.min())} "
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

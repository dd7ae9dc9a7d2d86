"""Checkpoints that are published quantised, seen as the plain ones that they were made from.

config.json says how weights are quantised. What cfsp can undo is dequantised tensor by tensor
whenever it is read, in float32 and rounded once, so that nothing above knows of it; everything else
is refused by name. Of four bits and less only MXFP4 is read, which some models are published in
alone.

Shapes: E experts, O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from cfsp.checkpoint.tensor_file import AGAIN, FileTensor, StoredTensor, TensorSpec
from cfsp.errors import CheckpointError

# Where a config says how its weights are quantised; then that of old compressed-tensors, and MLX's.
_QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")
# And where that of its weights, or of what they become.
_DTYPE_KEYS = ("dtype", "torch_dtype")

# Ends the name of weights of a few bits in whole numbers, by GPTQ and AWQ.
_PACKED_WEIGHT = ".qweight"
# Ends the name of what is subtracted before values are scaled, if there is any.
_ZERO_POINT = "_zero_point"

# FP4 (E2M1): a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_VALUES_AT_ONCE = 1 << 24  # in float32, and with what is computed on the way, some 300 MB
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# How activations are quantised, which is no property of the weights.
_OF_ACTIVATIONS = (
    "activation_scale", "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale",
    "output_scale", "output_zero_point",
)  # fmt: skip
_COMPRESSED_FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "mixed-precision", "dense",
)  # fmt: skip


@dataclass(frozen=True)
class DequantisedTensor(StoredTensor):
    """A tensor that is computed, when it is asked for, from the tensors that it is stored as."""

    spec: TensorSpec
    compute: Callable[[int, int], Tensor]  # in float32, from one row (of the first axis) to another

    def read_part(self, start: int, stop: int) -> Tensor:
        """Return the elements from one to another, flattened; only their rows are computed."""
        in_a_row = max(1, self.spec.row)
        first, last = start // in_a_row, ceil(stop / in_a_row)
        found = torch.empty((last - first, in_a_row), dtype=self.spec.dtype)
        step = max(1, _VALUES_AT_ONCE // in_a_row)
        for row in range(first, last, step):
            rows = self.compute(row, min(row + step, last))
            found[row - first : row - first + len(rows)] = rows.reshape(len(rows), -1)
        return found.view(-1)[start - first * in_a_row : stop - first * in_a_row]


class _NotUndoneError(Exception):
    """A way to quantise that cfsp does not undo; names it."""


def _from_mxfp4(blocks: FileTensor, scales: FileTensor, dtype: torch.dtype) -> DequantisedTensor:
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


def _from_scaled(
    values: FileTensor,
    scales: FileTensor,
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


def _scales(data: Tensor) -> Tensor:
    """Return scales in float32; bytes are exponents of two, which exp2 need not give exactly."""
    return data.view(torch.float8_e8m0fnu).float() if data.dtype == torch.uint8 else data.float()


def _grid(scale: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Return the shape of a scale with as many axes as its tensor has."""
    if all(length == 1 for length in scale):
        return (1,) * axes
    return (*scale, *(1,) * (axes - len(scale)))


def _impossible(part: FileTensor, expected: str) -> CheckpointError:
    dtype = str(part.spec.dtype).removeprefix("torch.")
    shape = list(part.spec.shape)
    return CheckpointError(
        f"{part.path}: {part.name} is {dtype} of shape {shape}, expected {expected}; {AGAIN}"
    )


@dataclass(frozen=True)
class Quantisation:
    """How weights are quantised; their parts are known by what names end with."""

    method: str  # as transformers calls it
    scale: str  # ends the name of the part with the scale
    dtypes: tuple[torch.dtype, ...] = _FP8  # of the values
    # Height and width of what has one scale, if scales are in blocks; None for pairs of FP4.
    block: tuple[int, int] | None = (1, 1)
    values: str = ""  # ends the name of the part with the values, and is not in the weight's


# By what a config says of a method; others are not undone.
_COMPRESSED = "compressed-tensors"
_METHODS = {
    each.method: each
    for each in (
        Quantisation("fp8", "_scale_inv"),
        Quantisation("mxfp8", "_scale_inv", block=(1, 32)),
        Quantisation("fbgemm_fp8", "_scale"),
        Quantisation("mxfp4", "_scales", (torch.uint8,), None, "_blocks"),
        Quantisation(_COMPRESSED, "_scale", (*_FP8, torch.int8)),
    )
}


def _block_in(method: str, described: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the size of the blocks that a config speaks of; None if it says nothing of blocks."""
    if method != _COMPRESSED:
        size = described.get("weight_block_size")
        return _block(size) if size else None
    groups = [each for each in _dict(described.get("config_groups")).values() if _dict(each)]
    for name in (described.get("format"), *(group.get("format") for group in groups)):
        if name is not None and name not in _COMPRESSED_FORMATS:
            raise _NotUndoneError(f"{method}, {name}")
    if _dict(described.get("sparsity_config")).get("format", "dense") != "dense":
        raise _NotUndoneError(f"{method}, sparse")
    if _dict(_dict(described.get("transform_config")).get("config_groups")):
        raise _NotUndoneError(f"{method}, transformed")
    weights = [_dict(group.get("weights")) for group in groups]
    if any(each.get("actorder") in ("group", "dynamic", True) for each in weights):
        raise _NotUndoneError(f"{method}, in groups by activation order")
    blocks = {_block(each["block_structure"]) for each in weights if each.get("block_structure")}
    sizes = [each.get("group_size") for each in weights]
    blocks |= {(1, _size(size)) for size in sizes if size not in (None, 0, -1)}
    if len(blocks) > 1:
        raise _NotUndoneError(f"{method}, in several ways at once")
    return blocks.pop() if blocks else None


def _block(size: object) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise _NotUndoneError(f"in blocks of {size!r}")
    return _size(size[0]), _size(size[1])


def _size(value: object) -> int:
    if type(value) is not int or value < 1:
        raise _NotUndoneError(f"in groups of {value!r}")
    return value


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def quantisation_in(fields: Mapping[str, Any], label: str) -> Quantisation | None:
    """Return how a checkpoint is quantised, by its config.json; None if it is not."""
    configs = (fields, *(each for each in fields.values() if isinstance(each, dict)))
    found = [config[key] for config in configs for key in _QUANTISATION_KEYS if config.get(key)]
    if not found:
        return None
    described = found[0] if isinstance(found[0], dict) else {"quant_method": found[0]}
    # Old configs of bitsandbytes name no method, and those of ModelOpt who it was.
    of_bits = next((k for k, v in described.items() if k.startswith("load_in_") and v), None)
    named = of_bits or _dict(described.get("producer")).get("name")
    method = str(described.get("quant_method", named or "a way that it does not name, as MLX"))
    try:
        if method not in _METHODS:
            raise _NotUndoneError(method)
        how = _METHODS[method]
        return replace(how, block=_block_in(method, described) or how.block)
    except _NotUndoneError as error:
        raise _refused(label, str(error)) from None


def check_is_not_packed(names: Collection[str], label: str) -> None:
    """Check that no weight is packed, which config.json of old GPTQ and AWQ models does not say."""
    if packed := next((name for name in names if name.endswith(_PACKED_WEIGHT)), None):
        raise _refused(label, f"{packed}, as of GPTQ or AWQ")


def _refused(label: str, how: str) -> CheckpointError:
    return CheckpointError(
        f"{label} is quantised ({' '.join(how.split())[:80]}), which cfsp cannot undo (it can: "
        f"{', '.join(_METHODS)}); prune the model that it was made from and quantise the result, "
        "or, where transformers can undo it, load it there, call dequantize() and "
        "save_pretrained(), and prune the result"
    )


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without what it says of quantisation."""
    # In 8 bits no model can be built.
    return {
        key: plain_fields(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in _QUANTISATION_KEYS and not (key in _DTYPE_KEYS and "float8" in str(value))
    }


def dequantised(
    tensors: Mapping[str, FileTensor], how: Quantisation, dtype: torch.dtype, label: str
) -> dict[str, StoredTensor]:
    """Return the tensors of the plain checkpoint that a quantised one stands for, by name.

    What is not quantised stays as it is stored; the rest becomes `dtype`.
    """
    plain: dict[str, StoredTensor] = {}
    taken: set[str] = set()
    if how.method == "fp8" and not any(name.endswith(how.scale) for name in tensors):
        how = replace(how, scale="_scale")  # as AutoFP8 calls the same, and vLLM reads it
    for name, tensor in tensors.items():
        of_another = name.endswith((how.scale, _ZERO_POINT))
        is_one = name.endswith(how.values) and tensor.spec.dtype in how.dtypes
        if of_another or not is_one:
            plain[name] = tensor
            continue
        weight = name.removesuffix(how.values)
        scale, point = weight + how.scale, weight + _ZERO_POINT
        if scale not in tensors:
            raise CheckpointError(f"{label} lacks the tensor {scale}, the scale of {name}; {AGAIN}")
        if how.block is None:
            plain[weight] = _from_mxfp4(tensor, tensors[scale], dtype)
        else:
            parts = tensor, tensors[scale], tensors.get(point)
            plain[weight] = _from_scaled(*parts, how.block, dtype)
        taken |= {name, scale, point} - {weight}
        for ending in _OF_ACTIVATIONS:
            taken |= {weight.removesuffix("weight") + ending, f"{weight}_{ending}"}
    if not taken:
        raise CheckpointError(
            f"{label} is quantised ({how.method}) by its config.json, but none of its tensors is; "
            f"remove {_QUANTISATION_KEYS[0]} there, or download it again"
        )
    plain = {name: tensor for name, tensor in plain.items() if name not in taken}
    _check_is_plain(plain, how, label)
    return plain


def _check_is_plain(tensors: Mapping[str, StoredTensor], how: Quantisation, label: str) -> None:
    """Check that no scale is left of something that is not quantised."""
    for name in tensors:
        owner = name.removesuffix(how.scale)
        if owner != name and owner in tensors:
            found = str(tensors[owner].spec.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{label} has {name} beside {owner} in {found}, which is not quantised; {AGAIN}"
            )

"""Checkpoints that are published quantised, seen as the plain ones that they were made from.

config.json says how weights are quantised. What cfsp can undo is dequantised tensor by tensor
whenever it is read, so that nothing above knows of it; everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from cfsp.checkpoint.dequantising import (
    DequantisedTensor,
    ImpossiblePartsError,
    Parts,
    StoredTensor,
    from_groups,
    from_mxfp4,
    from_scaled,
)
from cfsp.checkpoint.tensor_file import AGAIN, FileTensor
from cfsp.errors import CheckpointError

# Where a config says how its weights are quantised; the second is that of old compressed-tensors.
QUANTISATION_KEYS = ("quantization_config", "compression_config")

# Files beside the weights that say the same.
QUANTISATION_FILES = {"quantize_config.json", "quant_config.json", "hf_quant_config.json"}

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# What no plain weight is stored as.
_PACKED = (*_FP8, torch.int8, torch.uint8, torch.int32)
# How activations are quantised, which is no property of the weights.
_OF_ACTIVATIONS = (
    "activation_scale", "input_scale", "input_scale_ub", "input_zero_point", "input_global_scale",
    "output_scale", "output_zero_point",
)  # fmt: skip


@dataclass(frozen=True)
class Packing:
    """How one weight is stored: parts are known by what their names end with."""

    holder: str  # the part with the values
    plain: str  # what stands there in the name of the weight
    dtypes: tuple[torch.dtype, ...]  # of the values
    needed: tuple[str, ...]  # its other parts
    optional: tuple[str, ...]  # those that may be missing or do not count
    dequantise: Callable[[Parts, torch.dtype], DequantisedTensor]


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised; `method` is what transformers calls it."""

    method: str
    packings: tuple[Packing, ...] = field(repr=False)


def _scaled(scale: str, dtypes: tuple[torch.dtype, ...], block: tuple[int, int]) -> Packing:
    """Return numbers of 8 bits with a scale for each block of a matrix."""
    dequantise = partial(from_scaled, scale=scale, block=block)
    return Packing("", "", dtypes, (scale,), ("_zero_point",), dequantise)


_MXFP4 = Packing("_blocks", "", (torch.uint8,), ("_scales",), (), from_mxfp4)

_COMPRESSED_FORMATS = (
    "float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "mixed-precision",
    "dense",
)  # fmt: skip


def quantisation_in(fields: Mapping[str, Any], label: str) -> Quantisation | None:
    """Return how a checkpoint is quantised, by its config.json; None if it is not."""
    configs = (fields, *(each for each in fields.values() if isinstance(each, dict)))
    found = [config[key] for config in configs for key in QUANTISATION_KEYS if config.get(key)]
    if not found:
        return None
    described = found[0] if isinstance(found[0], dict) else {"quant_method": found[0]}
    method = str(described.get("quant_method"))
    try:
        if method not in _METHODS:
            raise _NotUndoneError(method)
        return Quantisation(method, _METHODS[method](described))
    except _NotUndoneError as error:
        what = " ".join(str(error).split())[:80]
        raise CheckpointError(
            f"{label} is quantised ({what}), which cfsp cannot undo (it can: "
            f"{', '.join(_METHODS)}); prune the model that it was made from and quantise the "
            "result, or, where transformers can undo it, load it there, call dequantize() and "
            "save_pretrained(), and prune the result"
        ) from None


def plain_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json without what it says of quantisation."""
    return {
        key: plain_fields(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in QUANTISATION_KEYS
    }


def dequantised(
    tensors: Mapping[str, FileTensor], how: Quantisation, dtype: torch.dtype, label: str
) -> dict[str, StoredTensor]:
    """Return the tensors of the plain checkpoint that a quantised one stands for, by name.

    What is not quantised stays as it is stored; the rest becomes `dtype`.
    """
    plain: dict[str, StoredTensor] = {}
    taken: set[str] = set()
    for name, tensor in tensors.items():
        packing = next((each for each in how.packings if _is_values(name, tensor, each)), None)
        if packing is None:
            plain[name] = tensor
            continue
        stem = name.removesuffix(packing.holder)
        weight = stem + packing.plain
        parts = _parts(stem, packing, tensors, label)
        try:
            plain[weight] = packing.dequantise(parts, dtype)
        except ImpossiblePartsError as error:
            raise CheckpointError(f"{label}: {error}; {AGAIN}") from None
        taken |= {part.name for part in parts.values()} - {weight}
        for ending in _OF_ACTIVATIONS:
            taken |= {weight.removesuffix("weight") + ending, f"{weight}_{ending}"}
    if not taken:
        raise CheckpointError(
            f"{label} is quantised ({how.method}) by its config.json, but none of its tensors is; "
            f"remove {QUANTISATION_KEYS[0]} there, or download it again"
        )
    plain = {name: tensor for name, tensor in plain.items() if name not in taken}
    _check_is_plain(plain, how, label)
    return plain


def _is_values(name: str, tensor: FileTensor, packing: Packing) -> bool:
    is_other = name.endswith((*packing.needed, *packing.optional))
    return name.endswith(packing.holder) and tensor.spec.dtype in packing.dtypes and not is_other


def _parts(
    stem: str, packing: Packing, tensors: Mapping[str, FileTensor], label: str
) -> dict[str, FileTensor]:
    for ending in packing.needed:
        if stem + ending not in tensors:
            raise CheckpointError(
                f"{label} lacks the tensor {stem}{ending}, the scale of {stem}{packing.holder}; "
                f"{AGAIN}"
            )
    endings = (packing.holder, *packing.needed, *packing.optional)
    return {ending: tensors[stem + ending] for ending in endings if stem + ending in tensors}


def _check_is_plain(tensors: Mapping[str, StoredTensor], how: Quantisation, label: str) -> None:
    """Check that nothing quantised is left, and no scale of something that is not."""
    endings = [ending for packing in how.packings for ending in packing.needed]
    for name, tensor in tensors.items():
        owners = (name.removesuffix(ending) for ending in endings if name.endswith(ending))
        owner = next((owner for owner in owners if owner in tensors), None)
        found = str(tensors[owner or name].spec.dtype).removeprefix("torch.")
        if owner is not None:
            raise CheckpointError(
                f"{label} has {name} beside {owner} in {found}, which is not quantised; {AGAIN}"
            )
        if tensor.spec.dtype in _PACKED and len(tensor.spec.shape) > 1:
            raise CheckpointError(
                f"{label}: {name} is stored as {found}, which {how.method} weights of its config "
                f"are not; {AGAIN}"
            )


class _NotUndoneError(Exception):
    """A way to quantise that cfsp does not undo; names it."""


def _of_fp8(
    scale: str, block: tuple[int, int], described: Mapping[str, Any]
) -> tuple[Packing, ...]:
    return (_scaled(scale, _FP8, _block(described.get("weight_block_size") or block)),)


def _of_compressed_tensors(described: Mapping[str, Any]) -> tuple[Packing, ...]:
    method = "compressed-tensors"
    groups = [each for each in _dict(described.get("config_groups")).values() if _dict(each)]
    formats = [described.get("format"), *(group.get("format") for group in groups)]
    for name in formats:
        if name is not None and name not in _COMPRESSED_FORMATS:
            raise _NotUndoneError(f"{method}, {name}")
    if _dict(described.get("sparsity_config")).get("format", "dense") != "dense":
        raise _NotUndoneError(f"{method}, sparse")
    if _dict(_dict(described.get("transform_config")).get("config_groups")):
        raise _NotUndoneError(f"{method}, transformed")
    weights = [_dict(group.get("weights")) for group in groups if group.get("weights")]
    blocks = {_block(each["block_structure"]) for each in weights if each.get("block_structure")}
    blocks |= {
        (1, _size(each["group_size"]))
        for each in weights
        if each.get("group_size") and "pack-quantized" not in formats
    }
    packed = {
        (_bits(each.get("num_bits")), _size(each.get("group_size") or -1))
        for each in weights
        if each.get("type", "int") == "int"
    }
    if len(blocks) > 1 or len(packed) > 1:
        raise _NotUndoneError(f"{method}, in several ways at once")
    bits, group_size = packed.pop() if packed else (8, -1)
    in_groups = Packing(
        "weight_packed", "weight", (torch.int32,), ("weight_scale",),
        ("weight_zero_point", "weight_g_idx", "weight_shape"),
        partial(from_groups, bits=bits, group_size=group_size),
    )  # fmt: skip
    block = blocks.pop() if blocks else (1, 1)
    return _scaled("_scale", (*_FP8, torch.int8), block), in_groups


def _bits(value: object) -> int:
    if type(value) is not int or value not in (2, 4, 8):
        raise _NotUndoneError(f"{value!r} bits")
    return value


def _block(size: object) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise _NotUndoneError(f"in blocks of {size!r}")
    return _size(size[0]), _size(size[1])


def _size(value: object) -> int:
    if type(value) is not int or (value != -1 and value < 1):
        raise _NotUndoneError(f"in groups of {value!r}")
    return value


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# How weights are stored by what a config says of a method; others are not undone.
_METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[Packing, ...]]] = {
    "fp8": partial(_of_fp8, "_scale_inv", (1, 1)),
    "mxfp8": partial(_of_fp8, "_scale_inv", (1, 32)),
    "fbgemm_fp8": partial(_of_fp8, "_scale", (1, 1)),
    "mxfp4": lambda said: (_MXFP4,),
    "compressed-tensors": _of_compressed_tensors,
}

"""Tiny checkpoints quantised by the documented formats, and the plain ones that they stand for.

Packing and unpacking are written in NumPy, from the formats' descriptions, and know nothing of the
code that they test.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

Array = NDArray[Any]
# The parts of a weight by what their names end with, and the plain weight.
Quantised = tuple[dict[str, torch.Tensor], Array]

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
BLOCK = (40, 24)  # neither divides the matrices of the tiny models


def nearest(values: Array, table: Array) -> Array:
    """Return the index of the number in a table that is nearest to each value."""
    order = np.argsort(table, kind="stable")
    middles = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(middles, values)]


def in_grid(grid: Array, shape: tuple[int, ...], block: tuple[int, int]) -> Array:
    """Return a value for every element of a matrix, from one for each block."""
    return np.kron(grid, np.ones(block, grid.dtype))[: shape[0], : shape[1]]


def block_maxima(weight: Array, block: tuple[int, int]) -> Array:
    edges = [(0, -n % size) for n, size in zip(weight.shape, block, strict=True)]
    padded = np.pad(np.abs(weight), edges)
    return padded.reshape(len(padded) // block[0], block[0], -1, block[1]).max((1, 3))


def of_bytes(data: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(data))


def fp8(weight: Array, block: tuple[int, int], ending: str = "scale_inv") -> Quantised:
    """Quantise with a scale for every block."""
    scale = block_maxima(weight, block) / 448
    per_value = in_grid(scale, weight.shape, block)
    codes = torch.from_numpy(weight / per_value).to(torch.float8_e4m3fn)
    parts = {"weight": codes, f"weight_{ending}": torch.from_numpy(scale)}
    return parts, codes.float().numpy() * per_value


def fp8_in_blocks(weight: Array, block: tuple[int, int] = BLOCK) -> Quantised:
    return fp8(weight, block)


def fp8_in_powers_of_two(weight: Array) -> Quantised:
    exponents = np.ceil(np.log2(block_maxima(weight, (1, 32)) / 448)).astype(int)
    per_value = in_grid(np.ldexp(np.float32(1), exponents), weight.shape, (1, 32))
    codes = torch.from_numpy(weight / per_value).to(torch.float8_e4m3fn)
    scale = torch.from_numpy((exponents + 127).astype(np.uint8))
    return {"weight": codes, "weight_scale_inv": scale}, codes.float().numpy() * per_value


def fp8_per_tensor(weight: Array, ending: str = "scale_inv") -> Quantised:
    parts, plain = fp8(weight, weight.shape, ending)
    parts[f"weight_{ending}"] = parts[f"weight_{ending}"].reshape(())
    of_activations = "activation_scale" if ending == "scale_inv" else "input_scale"
    return {**parts, of_activations: torch.tensor(0.5)}, plain


def fp8_per_row(weight: Array) -> Quantised:
    parts, plain = fp8(weight, (1, weight.shape[1]), "scale")
    return {**parts, "input_scale": torch.ones(1)}, plain


def int8_per_row(weight: Array) -> Quantised:
    lowest, highest = weight.min(1, keepdims=True), weight.max(1, keepdims=True)
    scale = (highest - lowest) / 255
    zero = np.round(-128 - lowest / scale)
    codes = np.clip(np.round(weight / scale) + zero, -128, 127)
    parts = {
        "weight": of_bytes(codes.astype(np.int8)),
        "weight_scale": torch.from_numpy(scale),
        "weight_zero_point": of_bytes(zero.astype(np.int8)),
    }
    return parts, ((codes - zero) * scale).astype(np.float32)


def mxfp4(weight: Array) -> Quantised:
    """Quantise experts x inputs x outputs, which are stored experts x outputs x inputs."""
    stored = weight.transpose(0, 2, 1)
    groups = stored.reshape(*stored.shape[:2], -1, 32)
    largest = np.maximum(np.abs(groups).max(-1), 1e-6)
    exponents = np.floor(np.log2(largest)).astype(int) - 2
    codes = nearest(np.ldexp(groups, -exponents[..., None]), FP4)
    plain = np.ldexp(FP4[codes], exponents[..., None]).astype(np.float32)
    parts = {
        "_blocks": of_bytes((codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)),
        "_scales": of_bytes((exponents + 127).astype(np.uint8)),
    }
    return parts, plain.reshape(stored.shape).transpose(0, 2, 1)


@dataclass(frozen=True)
class Way:
    """A way to quantise: the model to try it on, what config.json says, what makes the parts."""

    model: str
    config: dict[str, Any]
    quantise: Callable[[Array], Quantised]
    ending: str = "proj.weight"


def compressed(quantised_as: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "format": quantised_as}
    return {
        "quant_method": "compressed-tensors",
        "format": quantised_as,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}

WAYS = {
    "fp8 in blocks": Way("llama", {**_FP8, "weight_block_size": list(BLOCK)}, fp8_in_blocks),
    "fp8 experts": Way(
        "deepseek_v3", {**_FP8, "weight_block_size": list(BLOCK)}, fp8_in_blocks
    ),
    "fp8 per tensor": Way("llama", {**_FP8, "weight_block_size": None}, fp8_per_tensor),
    "fp8 of AutoFP8": Way(
        "llama", {**_FP8, "activation_scheme": "static"}, partial(fp8_per_tensor, ending="scale")
    ),
    "mxfp8": Way(
        "llama",
        {"quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"},
        fp8_in_powers_of_two,
    ),
    "fbgemm_fp8": Way("llama", {"quant_method": "fbgemm_fp8"}, fp8_per_row),
    "float-quantized": Way(
        "llama",
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        fp8_per_row,
    ),
    "int-quantized": Way(
        "llama",
        compressed("int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False),
        int8_per_row,
    ),
    "mxfp4": Way("gpt_oss", {"quant_method": "mxfp4"}, mxfp4, ending="experts"),
}  # fmt: skip


def quantise(plain: Path, target: Path, way: Way) -> None:
    """Write a quantised copy of a directory; its own weights become what that stands for."""
    stored = load_file(plain / "model.safetensors")
    quantised: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        of_experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        if not (name.endswith(way.ending) or (way.ending == "experts" and of_experts)):
            quantised[name] = tensor
            continue
        parts, values = way.quantise(tensor.float().numpy())
        stem = name.removesuffix("weight")
        quantised |= {stem + ending: part.contiguous() for ending, part in parts.items()}
        stored[name] = torch.from_numpy(np.ascontiguousarray(values)).to(tensor.dtype)
    shutil.copytree(plain, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    # In two files, with the parts of a weight in both.
    names = sorted(quantised)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({n: quantised[n] for n in members}, target / file, metadata={"format": "pt"})
    weight_map = {name: file for file, members in shards.items() for name in members}
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    fields = json.loads((target / "config.json").read_text())
    fields["quantization_config"] = way.config
    (target / "config.json").write_text(json.dumps(fields))

"""Experts as a checkpoint stores them, and as a model in memory holds them.

A checkpoint has a matrix of its own for every expert; transformers joins those of a block in two
parameters when it loads them (`WeightConverter`), and takes them apart when it saves them. All of
cfsp speaks of tensors as they are stored: what one expert owns is then a tensor like any other.

Shapes: E experts, F FFN channels, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.checkpoint.families import Family


@dataclass(frozen=True)
class Piece:
    """A stored tensor, and its place in a parameter in memory.

    Attributes:
        name: what the checkpoint calls it.
        place: index into the parameter; empty if the parameter is the stored tensor.
    """

    name: str
    place: tuple[int | slice, ...] = ()


def pieces(family: Family, name: str, shape: Sequence[int]) -> list[Piece]:
    """Return the stored tensors that a parameter is made of, in order.

    Args:
        family: the model's family.
        name: of the parameter, in the causal language model in memory.
        shape: of the parameter.
    """
    if family.experts is None:
        return [Piece(name)]
    match = re.match(rf"({re.escape(family.blocks)}\.(\d+)\.){family.mlp}\.(.+)$", name)
    if match is None:
        return [Piece(name)]
    prefix, block, rest = match[1], int(match[2]), match[3]
    if rest == "experts.down_proj":
        return [Piece(family.weight_name(block, family.down, e), (e,)) for e in range(shape[0])]
    if rest == "experts.gate_up_proj":
        assert family.gate is not None
        width = shape[1] // 2
        return [
            Piece(family.weight_name(block, matrix, e), (e, rows))
            for e in range(shape[0])
            for matrix, rows in ((family.gate, slice(width)), (family.up, slice(width, None)))
        ]
    return [Piece(f"{prefix}{family.experts.stored_mlp}.{rest}")]


def assemble(parts: Sequence[Piece], shape: Sequence[int], read: Callable[[str], Tensor]) -> Tensor:
    """Return a parameter as the model in memory holds it.

    Args:
        parts: its pieces.
        shape: of the parameter.
        read: gives a stored tensor by name; one at a time is in memory beside the parameter.
    """
    if not parts[0].place:
        return read(parts[0].name)
    whole: Tensor | None = None
    for part in parts:
        tensor = read(part.name)
        if whole is None:
            whole = torch.empty(tuple(shape), dtype=tensor.dtype, device=tensor.device)
        whole[part.place] = tensor
    assert whole is not None
    return whole

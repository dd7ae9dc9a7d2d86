"""The FFN matrices of a model, however its checkpoint stores them.

Shapes: D hidden, E experts, F FFN channels, K channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.found import Unit
    from cfsp.checkpoint.reading import WeightSource


def input_matrices(source: WeightSource, index: int, ffn: int = 0) -> tuple[Tensor | None, Tensor]:
    """Return gate and up of one FFN of the unit with an index, F x D; no gate if it has none."""
    unit = source.units[index]
    up_FD = _matrix(source, unit, unit.up, ffn)
    if unit.gate is None:
        return None, up_FD
    fusion = unit.axes[unit.up].fusion
    if fusion is None:
        return _matrix(source, unit, unit.gate, ffn), up_FD
    # Both are one parameter, which may be read from several tensors: it is read once.
    if fusion == "interleaved":
        return up_FD[::2], up_FD[1::2]
    gate_FD, up_FD = up_FD.chunk(2)
    return gate_FD, up_FD


def down_matrix(source: WeightSource, index: int, ffn: int = 0) -> Tensor:
    """Return the down projection of one FFN, D x F; of an attention its output matrix."""
    unit = source.units[index]
    return _matrix(source, unit, unit.down, ffn)


def _matrix(source: WeightSource, unit: Unit, path: str, ffn: int) -> Tensor:
    """Return a parameter of one FFN as outputs x inputs."""
    name = source.architecture.block_prefix(unit.block) + path
    matrix = source.parameter(name, expert=ffn if unit.routed else None)
    return matrix.T if _is_transposed(unit, path) else matrix


def parameters_with_down(
    source: WeightSource, index: int, down_of: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Return new down projections (D x K) of a unit's FFNs as its parameter, by its `origin`."""
    unit = source.units[index]
    downs = [down.T if _is_transposed(unit, unit.down) else down for down in down_of.values()]
    name = source.origin(source.architecture.block_prefix(unit.block) + unit.down)
    return {name: torch.stack(downs) if unit.routed else downs[0].contiguous()}


def _is_transposed(unit: Unit, path: str) -> bool:
    """Return whether a matrix is inputs x outputs: the outputs of `down` are no channels."""
    return (unit.axes[path].axis - unit.routed == 0) == (path == unit.down)

"""The FFN matrices of a model, however its checkpoint stores them.

Shapes: D hidden, E experts, F FFN channels, K channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.found import Unit
    from cfsp.checkpoint.reading import WeightSource

# Which matrix of an FFN; `down` of an attention is its output matrix.
Role = Literal["gate", "up", "down"]


def ffn_matrix(source: WeightSource, index: int, role: Role, ffn: int) -> Tensor | None:
    """Return a matrix of one FFN as outputs x inputs; None for the gate of one that has none.

    Args:
        source: the model.
        index: of the FFN unit in the model.
        role: gate, up or down.
        ffn: index of the FFN in the unit: of an expert, 0 of a dense one.
    """
    unit = source.units[index]
    path = {"gate": unit.gate, "up": unit.up, "down": unit.down}[role]
    if path is None:
        return None
    name = source.architecture.block_prefix(unit.block) + path
    matrix = source.parameter(name, expert=ffn if unit.routed else None)
    if _is_transposed(unit, path):
        matrix = matrix.T
    fusion = None if role == "down" else unit.axes[path].fusion
    if fusion is None:
        return matrix
    return matrix[role == "up" :: 2] if fusion == "interleaved" else matrix.chunk(2)[role == "up"]


def down_matrix(source: WeightSource, index: int, ffn: int = 0) -> Tensor:
    """Return the down projection of one FFN, D x F."""
    down_DF = ffn_matrix(source, index, "down", ffn)
    assert down_DF is not None
    return down_DF


def parameters_with_down(
    source: WeightSource, index: int, down_of: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Return the down projections of a unit as its parameter, by its `origin`.

    Args:
        source: the model.
        index: of the FFN unit in the model.
        down_of: FFN of the unit -> its new matrix, D x K, of all that stay.
    """
    unit = source.units[index]
    downs = [down.T if _is_transposed(unit, unit.down) else down for down in down_of.values()]
    name = source.origin(source.architecture.block_prefix(unit.block) + unit.down)
    return {name: torch.stack(downs) if unit.routed else downs[0].contiguous()}


def _is_transposed(unit: Unit, path: str) -> bool:
    """Return whether a matrix is inputs x outputs: the outputs of `down` are no channels."""
    return (unit.axes[path].axis - unit.routed == 0) == (path == unit.down)

"""The FFN matrices of a model, however its checkpoint stores them.

Shapes: D hidden, F FFN channels, K channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from cfsp.checkpoint.stored_layout import Role

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.checkpoint.reading import WeightSource


def ffn_matrix(source: WeightSource, unit: int, role: Role, ffn: int) -> Tensor | None:
    """Return a matrix of one FFN as outputs x inputs; None for the gate of one that has none.

    Args:
        source: the model.
        unit: index of the FFN unit in the model.
        role: which matrix.
        ffn: index of the FFN in the unit: of an expert, 0 of a dense one.
    """
    return source.stored.matrix(unit, role, ffn, source.read)


def down_matrix(source: WeightSource, unit: int, ffn: int = 0) -> Tensor:
    """Return the down projection of one FFN, D x F."""
    down_DF = ffn_matrix(source, unit, "down", ffn)
    assert down_DF is not None
    return down_DF


def tensors_with_down(
    source: WeightSource, unit: int, down_of: Mapping[int, Tensor]
) -> dict[str, Tensor]:
    """Return the stored tensors of a unit whose FFNs have new down projections.

    Args:
        source: the model.
        unit: index of the FFN unit in the model.
        down_of: FFN of the unit -> its new matrix, D x K, of all that stay.
    """
    return source.stored.down_tensors(unit, down_of)

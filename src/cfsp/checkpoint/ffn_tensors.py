"""The FFN matrices of a model, however its checkpoint stores them.

Shapes: D hidden, F FFN channels, K channels that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.stored_layout import Role

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.checkpoint.stored_tensors import StoredTensors


def ffn_matrix(source: WeightSource, unit: int, role: Role, ffn: int) -> Tensor | None:
    """Return a matrix of one FFN as outputs x inputs; None for the gate of one that has none.

    Args:
        source: the model; what holds all experts is read whole.
        unit: index of the FFN unit in the model.
        role: gate, up or down.
        ffn: index of the FFN in the unit: of an expert, 0 of a dense one.
    """
    name = _holder(source.stored, unit, role, ffn)
    if name is None:
        return None
    return source.stored.layouts[name].matrix(source.read(name), role, ffn)


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
    stored = source.stored
    name = stored.matrix_names.get((unit, "down", None))
    if name is not None:
        transposed = stored.layouts[name].transposed
        return {name: torch.stack([down.T if transposed else down for down in down_of.values()])}
    tensors = {}
    for ffn, down in down_of.items():
        name = stored.matrix_names[unit, "down", ffn]
        tensors[name] = (down.T if stored.layouts[name].transposed else down).contiguous()
    return tensors


def _holder(stored: StoredTensors, unit: int, role: Role, ffn: int) -> str | None:
    """Return the stored tensor that has a matrix of an FFN."""
    for stored_role in (role, "both") if role != "down" else (role,):
        for holder in (ffn, None):
            name = stored.matrix_names.get((unit, stored_role, holder))
            if name is not None:
                return name
    assert role == "gate", (unit, role, ffn)
    return None

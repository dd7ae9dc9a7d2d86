"""Compensation by a bias: the down projection adds what the pruned channels added on average.

    b' = b + W_P E[x_P]

Source: FLAP (An et al., arXiv 2312.11983). It needs means only, which every calibration has, so
there is no pass of its own. The bias is a tensor that the stock model may not have.

Shapes: D hidden, F FFN channels, P pruned.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cfsp.calibration.statistics import BlockStatistics, Statistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.tensor_file import TensorFile, outgoing_tensor, write_tensor_file
from cfsp.errors import UnsupportedModelError
from cfsp.planning.plan_file import BlockPlan, PruningPlan


def check_can_compensate(source: WeightSource) -> None:
    """Check that the down projections of a model can have a bias.

    Raises:
        UnsupportedModelError: they are experts, whose matrices are one tensor without biases.
    """
    if source.family.experts is not None:
        raise UnsupportedModelError(
            f"--restore bias is not possible for {source.family.model_type}: its experts have no "
            "place for biases; use --restore ridge or none"
        )


def compensate(
    source: WeightSource, plan: PruningPlan, statistics: Statistics, path: Path
) -> TensorFile:
    """Write the biases of all down projections to a file.

    Args:
        source: the model; its down projections are read one at a time.
        plan: which channels stay.
        statistics: of the model.
        path: where the file goes.
    """
    outgoing = []
    for block, (entry, observed) in enumerate(zip(plan.blocks, statistics.blocks, strict=True)):
        weight = source.read(source.family.weight_name(block, source.family.down))
        bias_D = lost_mean(source.family.turned(weight), entry, observed)
        name = source.family.down_bias_name(block)
        dtype = weight.dtype
        if name in source.specs:
            own_D = source.read(name)
            dtype = own_D.dtype
            bias_D = bias_D + own_D.double().cpu()
        outgoing.append(outgoing_tensor(name, bias_D.to(dtype)))
    write_tensor_file(path, outgoing)
    return TensorFile(path)


def lost_mean(down_DF: Tensor, entry: BlockPlan, statistics: BlockStatistics) -> Tensor:
    """Return W_P E[x_P], the mean contribution of the pruned channels, float64 [D]."""
    pruned_F = torch.ones(entry.width, dtype=torch.bool)
    pruned_F[torch.tensor(entry.kept)] = False
    lost_D: Tensor = down_DF[:, pruned_F].double().cpu() @ statistics.mean_F.cpu()[pruned_F]
    return lost_D

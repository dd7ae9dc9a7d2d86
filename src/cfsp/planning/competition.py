"""Widths from channel scores alone: the channels of all blocks compete for one budget.

Source: FLAP (An et al., arXiv 2312.11983), its adaptive structure of the whole model.
Shapes: F FFN channels, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def standardised(score_F: Tensor) -> Tensor:
    """Return scores with mean 0 and standard deviation 1; zeros if they are all alike."""
    centred_F = score_F.double() - score_F.double().mean()
    deviation = centred_F.square().mean().sqrt()
    return centred_F / deviation if deviation > 0 else torch.zeros_like(centred_F)


def channels_above_threshold(score_F_of_L: Sequence[Tensor], total: int) -> list[int]:
    """Return how many channels of every block are among the `total` strongest of all.

    Args:
        score_F_of_L: standardised scores of every block, higher = keep.
        total: how many channels stay in the whole model; ties go to earlier blocks.
    """
    block_C = torch.cat(
        [torch.full((len(score_F),), block) for block, score_F in enumerate(score_F_of_L)]
    )
    order_C = torch.sort(torch.cat(list(score_F_of_L)), descending=True, stable=True).indices
    return torch.bincount(block_C[order_C[:total]], minlength=len(score_F_of_L)).tolist()

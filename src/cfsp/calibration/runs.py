"""How far runs of consecutive blocks turn the hidden state, from one pass over a few tokens.

What enters the first block of a run and what leaves the last are many blocks apart, so the hidden
states of some tokens are kept at every block.

Shapes: B windows, T tokens, S tokens of the sample, D hidden, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.statistics import RunDistances

if TYPE_CHECKING:
    from cfsp.text.windows import Windows

# In all: their hidden states at every block are in memory.
SAMPLED_TOKENS = 1024


@dataclass(frozen=True)
class TokenSample:
    """Which tokens of every window are looked at.

    Attributes:
        stride: one of so many, the first of them amid the first so many: the first token of a
            window is unlike all others.
    """

    stride: int

    @staticmethod
    def of(windows: Windows) -> TokenSample:
        """Return the sample of some windows."""
        count, seqlen = windows.tokens_NT.shape
        return TokenSample(max(1, min(seqlen, count * seqlen // SAMPLED_TOKENS)))

    def rows(self, hidden_BTD: Tensor) -> Tensor:
        """Return the hidden states of the sample's tokens, S x D."""
        return hidden_BTD[:, self.stride // 2 :: self.stride].flatten(0, 1)


def run_distances(passing_L: Sequence[Tensor]) -> RunDistances:
    """Return the angular distances over all runs of blocks.

    Args:
        passing_L: of each block, the hidden states that enter and leave it (2 x S x D).
    """
    states = [passing_L[0][0], *(passing[1] for passing in passing_L)]
    unit = [torch.nn.functional.normalize(state.float(), dim=-1) for state in states]
    sums = [[0.0] * len(unit) for _ in unit]
    for first, before_SD in enumerate(unit):
        for end in range(first + 1, len(unit)):
            cosine_S = (before_SD * unit[end]).sum(-1).clamp(-1.0, 1.0)
            sums[first][end] = float((torch.arccos(cosine_S) / math.pi).double().sum())
    return RunDistances(tuple(map(tuple, sums)), unit[0].shape[0])

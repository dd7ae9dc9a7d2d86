"""How far the hidden states of a pruned model are from the dense model's.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cfsp.errors import CalibrationError

# The root of zero has no gradient, and a block that loses no channel may have no error.
_LEAST_SQUARE = 1e-12


@dataclass(frozen=True)
class Judgement:
    """How far blocks are from the dense model, on held-out windows.

    Attributes:
        error: of the last block's output hidden states, relative to the dense stream (see
            `token_error`).
        loss: what is to become less, such as `hidden_loss`.
    """

    error: float
    loss: float

    @property
    def is_finite(self) -> bool:
        """Whether neither is NaN or infinite."""
        return math.isfinite(self.error) and math.isfinite(self.loss)

    def check_finite(self, block: int) -> None:
        """Check that a block computes no NaN as it is.

        Raises:
            CalibrationError: it does.
        """
        if not self.is_finite:
            raise CalibrationError(
                f"block {block} produced NaN or infinite activations; "
                "prune with --set dtype=float32 or bfloat16"
            )


def token_error(output_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return |output - dense| / |dense| of each token, averaged, in float32.

    Relative to each token: the first tokens of a window have a thousand times the energy of the
    others, or more, and would be all that counts.
    """
    dense = dense_BTD.float()
    difference = output_BTD.float() - dense
    energy = dense.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference.square().sum(-1) / energy + _LEAST_SQUARE).sqrt().mean()


def hidden_loss(output_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return the error of each token, averaged, and that of all together, added.

    The second guards the few tokens of huge energy, which attention of other tokens rests on: if
    they lose it, or others gain it, all later blocks break, and one in a thousand hardly shows in
    the first.
    """
    difference = output_BTD.float() - dense_BTD.float()
    energy = dense_BTD.float().square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    whole = (difference.square().sum() / energy + _LEAST_SQUARE).sqrt()
    return token_error(output_BTD, dense_BTD) + whole

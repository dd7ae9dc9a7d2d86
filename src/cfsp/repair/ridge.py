"""Ridge repair: the kept columns of a down projection take over what the pruned did.

    W' = W_K + W_P G_PK (G_KK + lambda mean(diag G_KK) I)^-1

minimises the mean squared error of the FFN's output over calibration tokens, plus a penalty
on the change. No new tensors, shapes as planned.

Shapes: D hidden, F channels, K kept (the size of the system), P pruned, R rows (held-out tokens), C
right-hand sides (a slice of D), W columns of a panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cfsp.repair.gram import ROWS, exact_fast_matmul

# Relative ridge strengths, to be chosen from on held-out tokens. With some 28,000 tokens of a
# mixed text most blocks of SmolLM2-135M choose 0.1 or more; more tokens want less.
LAMBDAS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)

# Columns of a panel of the system.
PANEL = 512
# Right-hand sides that are solved for at once, in float64.
SOLVE_COLUMNS = 512


@dataclass(frozen=True)
class RidgeSolution:
    """A repaired down projection and how well it does."""

    # The new weights, in the dtype of the old.
    down_DK: Tensor
    # The chosen lambda; None if no strength was better than none at all.
    ridge: float | None
    # Relative squared error of the FFN's output on held-out tokens, with the channels removed and
    # nothing else done, and with the new weights, which is never larger.
    error_before: float
    error_after: float
    # Sum of squares of the FFN's output on held-out tokens.
    energy: float


def repair_down_projection(
    down_DF: Tensor,
    kept: Sequence[int],
    gram_FF: Tensor | None,
    held_out_RF: Tensor,
    lambdas: Sequence[float] = LAMBDAS,
) -> RidgeSolution:
    """Return the repaired down projection of one FFN.

    The strength is chosen on held-out tokens, which the Gram matrix E[x xᵀ] has not seen: the
    middle one is tried first, and in either direction no more once one does worse than the one
    before. If every one does worse than no repair, the weights stay as they are; so they do without
    a Gram matrix.
    """
    mask_F = torch.zeros(down_DF.shape[1], dtype=torch.bool, device=down_DF.device)
    mask_F[torch.tensor(kept, dtype=torch.long, device=down_DF.device)] = True
    kept_K, pruned_P = mask_F.nonzero().flatten(), (~mask_F).nonzero().flatten()
    plain_DK = down_DF.index_select(1, kept_K)
    error_of = _HeldOutError(down_DF, held_out_RF, kept_K)
    error = error_of(plain_DK)
    best = RidgeSolution(plain_DK, None, error, error, error_of.energy)
    if gram_FF is None or len(pruned_P) == 0:
        return best

    def lost(part: slice) -> Tensor:
        """Return G_KP W_Pᵀ in float64, one panel of rows at a time."""
        pruned_CP = down_DF[part].index_select(1, pruned_P).double()
        panels = torch.split(kept_K, PANEL)
        return torch.cat(
            [gram_FF[rows].index_select(1, pruned_P).double() @ pruned_CP.T for rows in panels]
        )

    def error_with(number: int) -> float:
        """Return the error with one strength, and keep the weights if they are the best so far."""
        nonlocal best
        candidate_DK = solved(plain_DK, gram_FF, kept_K, lambdas[number], lost)
        if candidate_DK is None:
            return math.inf
        error = error_of(candidate_DK)
        if error < best.error_after:
            best = replace(best, down_DK=candidate_DK, ridge=lambdas[number], error_after=error)
        return error

    _descend(error_with, len(lambdas))
    return best


def _descend(error_with: Callable[[int], float], count: int) -> None:
    """Try strengths from the middle one on, upwards and then downwards, while they get better."""
    middle = count // 2
    at_middle = error_with(middle)
    for numbers in (range(middle + 1, count), range(middle - 1, -1, -1)):
        previous = at_middle
        for number in numbers:
            error = error_with(number)
            if error > previous:
                break
            previous = error
        if previous < at_middle:
            break


class _HeldOutError:
    """Relative squared error of the FFN's output on held-out tokens."""

    def __init__(self, down_DF: Tensor, held_out_RF: Tensor, kept_K: Tensor) -> None:
        self._kept_RK = held_out_RF.index_select(1, kept_K)
        self._target_RD = _output(held_out_RF, down_DF)
        self.energy = float(self._target_RD.double().square().sum())

    def __call__(self, down_DK: Tensor) -> float:
        output_RD = _output(self._kept_RK, down_DK)
        squares = float((output_RD - self._target_RD).double().square().sum())
        return squares / self.energy if self.energy > 0 else 0.0


def _output(act_RF: Tensor, down_DF: Tensor) -> Tensor:
    """Return the output of an FFN in float32; activations are float32 a few rows at a time."""
    dtype = act_RF.dtype if act_RF.dtype == down_DF.dtype else torch.float32
    exact_DF = down_DF.float()
    with exact_fast_matmul(dtype, act_RF.device):
        parts = [part_RF.float() @ exact_DF.T for part_RF in torch.split(act_RF, ROWS)]
    return torch.cat(parts)


def solved(
    old_DK: Tensor,
    gram_FF: Tensor,
    index_K: Tensor,
    ridge: float,
    right_of: Callable[[slice], Tensor],
) -> Tensor | None:
    """Return old + Rᵀ (G_KK + ridge mean(diag G_KK) I)^-1 in the dtype of the old weights.

    `right_of` gives some columns of R, of the outputs in a slice, K x C in float64, to be written
    over. None if the matrix is not positive definite.
    """
    system = lower_panels(gram_FF, index_K)
    add_to_diagonal(system, ridge * float(gram_FF.diagonal()[index_K].double().mean()))
    if not factor(system):
        return None
    new_DK = torch.empty_like(old_DK)
    for start in range(0, len(old_DK), SOLVE_COLUMNS):
        part = slice(start, start + SOLVE_COLUMNS)
        right_KC = right_of(part)
        solve(system, right_KC)
        new_DK[part] = (old_DK[part].double() + right_KC.T).to(old_DK.dtype)
    return new_DK


# Cholesky factor and solve of a large symmetric system, with half of its matrix in memory: the
# lower triangle is kept as column panels, which hold their columns from the diagonal down. A whole
# float64 matrix of 14336 channels would be 1.6 GB, its triangle is half of that, and torch's own
# `cholesky` and `cholesky_solve` need a second one. All is done in place, panel by panel.


def lower_panels(gram_FF: Tensor, index_K: Tensor) -> list[Tensor]:
    """Return the lower triangle of G_KK in float64, of a complete symmetric matrix."""
    panels = []
    for start in range(0, len(index_K), PANEL):
        columns = index_K[start : start + PANEL]
        # Rows are contiguous, columns are not: gather the transpose.
        panels.append(gram_FF[columns].index_select(1, index_K[start:]).T.double().contiguous())
    return panels


def add_to_diagonal(panels: Sequence[Tensor], value: float) -> None:
    """Add a number to every diagonal element."""
    for panel in panels:
        panel[: panel.shape[1]].diagonal().add_(value)


def factor(panels: Sequence[Tensor]) -> bool:
    """Replace a matrix by its Cholesky factor L, right-looking, if it is positive definite."""
    for number, panel in enumerate(panels):
        width = panel.shape[1]
        corner, info = torch.linalg.cholesky_ex(panel[:width])
        if int(info) != 0 or not bool(torch.isfinite(corner).all()):
            return False
        panel[:width] = corner
        below = panel[width:]
        below.copy_(torch.linalg.solve_triangular(corner.T, below, upper=True, left=False))
        for later in panels[number + 1 :]:
            later -= below @ below[: later.shape[1]].T
            below = below[later.shape[1] :]
    return True


def solve(panels: Sequence[Tensor], right_KC: Tensor) -> None:
    """Replace B by the solution X of L Lᵀ X = B, with L as `factor` leaves it."""
    size = panels[0].shape[0]
    for panel in panels:
        width, start = panel.shape[1], size - panel.shape[0]
        own_WC, below_C = right_KC[start : start + width], right_KC[start + width :]
        own_WC.copy_(torch.linalg.solve_triangular(panel[:width], own_WC, upper=False))
        below_C -= panel[width:] @ own_WC
    for panel in reversed(panels):
        width, start = panel.shape[1], size - panel.shape[0]
        own_WC, below_C = right_KC[start : start + width], right_KC[start + width :]
        own_WC -= panel[width:].T @ below_C
        own_WC.copy_(torch.linalg.solve_triangular(panel[:width].T, own_WC, upper=True))

"""Ridge restoration: the kept columns of a down projection take over what the pruned did.

    W' = W_K + W_P G_PK (G_KK + lambda mean(diag G_KK) I)^-1

minimises the mean squared error of the FFN's output over calibration tokens, plus a penalty
on the change. No new tensors, shapes as planned. Shapes: D hidden, F channels, K kept, P
pruned, R rows (held-out tokens), C columns (a slice of D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Relative ridge strengths, to be chosen from on held-out tokens. With some 28,000 tokens of a
# mixed text most blocks of SmolLM2-135M choose 0.1 or more; more tokens want less.
LAMBDAS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)

# The solve is float64; these bound how much of it is in memory at once.
_FACTOR_PANEL = 512
_SOLVE_COLUMNS = 512


@dataclass(frozen=True)
class RidgeSolution:
    """A repaired down projection and how well it does.

    Attributes:
        down_DK: the new weights, in the dtype of the old.
        ridge: the chosen lambda; None if no repair was better than leaving the weights.
        error_before: relative squared error of the FFN's output on held-out tokens, with the
            channels removed and nothing else done.
        error_after: the same with the new weights; never larger.
        energy: sum of squares of the FFN's output on held-out tokens.
    """

    down_DK: Tensor
    ridge: float | None
    error_before: float
    error_after: float
    energy: float


def leave_as_it_is(down_DF: Tensor, kept: Sequence[int], held_out_RF: Tensor) -> RidgeSolution:
    """Return the down projection of one FFN with channels removed and nothing else done."""
    return _unrepaired(down_DF, kept, held_out_RF)[0]


def _unrepaired(
    down_DF: Tensor, kept: Sequence[int], held_out_RF: Tensor
) -> tuple[RidgeSolution, _HeldOutError]:
    kept_K = torch.tensor(kept, device=down_DF.device)
    plain_DK = down_DF.index_select(1, kept_K)
    error_of = _HeldOutError(down_DF, held_out_RF, kept_K)
    error = error_of(plain_DK)
    return RidgeSolution(plain_DK, None, error, error, error_of.energy), error_of


def restore_down_projection(
    down_DF: Tensor,
    kept: Sequence[int],
    gram_FF: Tensor,
    held_out_RF: Tensor,
    lambdas: Sequence[float] = LAMBDAS,
) -> RidgeSolution:
    """Return the repaired down projection of one block.

    The strength is chosen on tokens that the Gram matrix has not seen. If every strength does
    worse there than no repair, the weights stay as they are.

    Args:
        down_DF: the weights before pruning.
        kept: indices of the channels that stay, ascending.
        gram_FF: E[x xᵀ] over calibration tokens, float32.
        held_out_RF: activations of held-out tokens.
        lambdas: relative strengths to try, ascending; once one does worse than the one before,
            the rest is not tried.
    """
    device = gram_FF.device
    mask_F = torch.zeros(down_DF.shape[1], dtype=torch.bool, device=device)
    mask_F[torch.tensor(kept, device=device)] = True
    kept_K, pruned_P = mask_F.nonzero().flatten(), (~mask_F).nonzero().flatten()
    best, error_of = _unrepaired(down_DF, kept, held_out_RF)
    plain_DK = best.down_DK
    if len(pruned_P) == 0:
        return best
    previous = math.inf
    for ridge in lambdas:
        candidate_DK = _solve(down_DF, plain_DK, gram_FF, kept_K, pruned_P, ridge)
        if candidate_DK is None:
            continue
        error = error_of(candidate_DK)
        if error > previous:
            break
        previous = error
        if error < best.error_after:
            best = replace(best, down_DK=candidate_DK, ridge=ridge, error_after=error)
    return best


class _HeldOutError:
    """Relative squared error of the FFN's output on held-out tokens."""

    def __init__(self, down_DF: Tensor, held_out_RF: Tensor, kept_K: Tensor) -> None:
        self._kept_RK = held_out_RF.index_select(1, kept_K).float()
        self._target_RD = held_out_RF.float() @ down_DF.float().T
        self.energy = float(self._target_RD.double().square().sum())

    def __call__(self, down_DK: Tensor) -> float:
        output_RD = self._kept_RK @ down_DK.float().T
        squares = float((output_RD - self._target_RD).double().square().sum())
        return squares / self.energy if self.energy > 0 else 0.0


def _solve(
    down_DF: Tensor,
    plain_DK: Tensor,
    gram_FF: Tensor,
    kept_K: Tensor,
    pruned_P: Tensor,
    ridge: float,
) -> Tensor | None:
    """Return W' for one strength; None if the matrix is not positive definite."""
    system_KK = _gather(gram_FF, kept_K)
    diagonal_K = system_KK.diagonal()
    diagonal_K.add_(ridge * float(diagonal_K.mean()))
    if not factor_in_place(system_KK):
        return None
    restored_DK = torch.empty_like(plain_DK)
    for start in range(0, down_DF.shape[0], _SOLVE_COLUMNS):
        part = slice(start, start + _SOLVE_COLUMNS)
        pruned_CP = down_DF[part].index_select(1, pruned_P).double()
        lost_KC = _times_gram(gram_FF, kept_K, pruned_P, pruned_CP)
        solve_in_place(system_KK, lost_KC)
        restored_DK[part] = (plain_DK[part].double() + lost_KC.T).to(plain_DK.dtype)
    return restored_DK


def _gather(gram_FF: Tensor, index_K: Tensor) -> Tensor:
    """Return G_KK in float64 without a float32 copy of it beside."""
    size = len(index_K)
    result_KK = torch.empty(size, size, dtype=torch.float64, device=gram_FF.device)
    for start in range(0, size, _FACTOR_PANEL):
        part = index_K[start : start + _FACTOR_PANEL]
        result_KK[start : start + len(part)] = gram_FF[part].index_select(1, index_K)
    return result_KK


def _times_gram(gram_FF: Tensor, kept_K: Tensor, pruned_P: Tensor, pruned_CP: Tensor) -> Tensor:
    """Return G_KP W_Pᵀ in float64, one panel of rows at a time."""
    panels = [
        gram_FF[part].index_select(1, pruned_P).double() @ pruned_CP.T
        for part in torch.split(kept_K, _FACTOR_PANEL)
    ]
    return torch.cat(panels)


def factor_in_place(matrix_KK: Tensor) -> bool:
    """Replace the lower triangle of a symmetric matrix by its Cholesky factor.

    Right-looking and blocked: torch's own needs a second matrix of the same size, which at
    14336 channels is another 1.6 GB. The upper triangle is left undefined.

    Returns:
        Whether the matrix is positive definite.
    """
    size = matrix_KK.shape[0]
    for start in range(0, size, _FACTOR_PANEL):
        stop = min(start + _FACTOR_PANEL, size)
        corner, info = torch.linalg.cholesky_ex(matrix_KK[start:stop, start:stop])
        if int(info) != 0 or not bool(torch.isfinite(corner).all()):
            return False
        matrix_KK[start:stop, start:stop] = corner
        below = matrix_KK[stop:, start:stop]
        below.copy_(torch.linalg.solve_triangular(corner.T, below, upper=True, left=False))
        for column in range(stop, size, _FACTOR_PANEL):
            end = min(column + _FACTOR_PANEL, size)
            left = matrix_KK[column:, start:stop]
            matrix_KK[column:, column:end] -= left @ matrix_KK[column:end, start:stop].T
    return True


def solve_in_place(factor_KK: Tensor, right_KC: Tensor) -> None:
    """Replace B by the solution X of L L^T X = B, panel by panel.

    torch's `cholesky_solve` copies the whole factor, for every few columns again.

    Args:
        factor_KK: L, as `factor_in_place` leaves it.
        right_KC: B, and then X.
    """
    size = factor_KK.shape[0]
    starts = range(0, size, _FACTOR_PANEL)
    for start in starts:
        stop = min(start + _FACTOR_PANEL, size)
        corner, panel_PC = factor_KK[start:stop, start:stop], right_KC[start:stop]
        panel_PC.copy_(torch.linalg.solve_triangular(corner, panel_PC, upper=False))
        right_KC[stop:] -= factor_KK[stop:, start:stop] @ panel_PC
    for start in reversed(starts):
        stop = min(start + _FACTOR_PANEL, size)
        corner, panel_PC = factor_KK[start:stop, start:stop], right_KC[start:stop]
        panel_PC -= factor_KK[stop:, start:stop].T @ right_KC[stop:]
        panel_PC.copy_(torch.linalg.solve_triangular(corner.T, panel_PC, upper=True))

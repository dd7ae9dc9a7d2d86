"""Cholesky factor and solve of a large symmetric system, with half of its matrix in memory.

The lower triangle is kept as column panels: a panel holds its columns from the diagonal down. A
whole float64 matrix of 14336 channels would be 1.6 GB, its triangle is half of that, and torch's
own `cholesky` and `cholesky_solve` need a second one. All is done in place, panel by panel.

Shapes: F channels, K of them in the system, W columns of a panel (rows below: K - start), C
right-hand sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PANEL = 512
# Right-hand sides that are solved for at once, in float64.
SOLVE_COLUMNS = 512


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


def ridge_factor(gram_FF: Tensor, index_K: Tensor, ridge: float) -> list[Tensor] | None:
    """Return the factor of G_KK + ridge mean(diag G_KK) I; None if it is not positive definite."""
    system = lower_panels(gram_FF, index_K)
    add_to_diagonal(system, ridge * float(gram_FF.diagonal()[index_K].double().mean()))
    return system if factor(system) else None


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

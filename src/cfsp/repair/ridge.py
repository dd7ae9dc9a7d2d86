"""Ridge repair: the kept columns of a down projection take over what the pruned did.

    W' = W_K + W_P G_PK (G_KK + lambda mean(diag G_KK) I)^-1

minimises the mean squared error of the FFN's output over calibration tokens, plus a penalty
on the change. No new tensors, shapes as planned. G is the Gram matrix over most windows; a few are
held out.

Shapes: N windows, R rows (tokens), D hidden, F channels, E FFNs of a unit (1, or its experts), K
kept (the size of the system), P pruned, C right-hand sides (a slice of D), W columns of a panel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cfsp.checkpoint.loading import multiplying_in
from cfsp.processes import Team

# Relative ridge strengths, to be chosen from on held-out tokens. With some 28,000 tokens of a
# mixed text most blocks of SmolLM2-135M choose 0.1 or more; more tokens want less.
LAMBDAS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)

PANEL = 512  # columns of a panel of the system
SOLVE_COLUMNS = 512  # right-hand sides that are solved for at once, in float64
_TILES = 4  # tiles of the upper triangle: at 4 tiles a side, 10 of 16 are computed
_LARGEST_TILE = 2048
# Rows that are float32 at once: a batch of 4096 would be another 0.2 GB at 14336 channels.
ROWS = 1024


class GramSums:
    """Sum over tokens of x xᵀ, float32, F x F; only the upper triangle until it is complete."""

    def __init__(self) -> None:
        self.tokens = 0
        self._gram_FF: Tensor | None = None
        self._is_mean = False

    def add(self, act_RF: Tensor) -> None:
        """Add rows of activations."""
        channels = act_RF.shape[1]
        if self._gram_FF is None:
            self._gram_FF = torch.zeros(channels, channels, device=act_RF.device)
        for part_RF in torch.split(act_RF, ROWS):
            exact_RF = part_RF.float()
            with exact_fast_matmul(act_RF.dtype, act_RF.device):
                for tile in _tiles(channels):
                    rows, right = slice(*tile), slice(tile[0], channels)
                    self._gram_FF[rows, right].addmm_(exact_RF[:, rows].T, exact_RF[:, right])
        self.tokens += act_RF.shape[0]

    def add_up_at(self, rank: int, team: Team, channels: int, device: torch.device) -> None:
        """Make the sums of one of several processes those of all; the others have none any more.

        A process without a row is told how many channels there are, and where it computes.
        """
        if self._gram_FF is None:
            self._gram_FF = torch.zeros(channels, channels, device=device)
        tokens = torch.tensor([self.tokens], device=device)
        team.add_up_at(rank, chain([tokens], self._contiguous_parts()))
        self.tokens = int(tokens)
        if team.rank != rank:
            self._gram_FF = None

    def _contiguous_parts(self) -> Iterator[Tensor]:
        """Yield what is computed, tile by tile; what becomes of a tile is kept."""
        assert self._gram_FF is not None
        for start, stop in _tiles(len(self._gram_FF)):
            part = self._gram_FF[start:stop, start:]
            contiguous = part.contiguous()
            yield contiguous
            part.copy_(contiguous)

    def mean(self) -> Tensor:
        """Return the complete mean E[x xᵀ]; it takes the place of the sums: memory holds one."""
        gram_FF = self._gram_FF
        assert gram_FF is not None
        if self._is_mean:
            return gram_FF
        self._is_mean = True
        channels = gram_FF.shape[0]
        for start, stop in _tiles(channels):
            gram_FF[stop:, start:stop] = gram_FF[start:stop, stop:].T
            diagonal = gram_FF[start:stop, start:stop]
            diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).T)
        return gram_FF.div_(self.tokens)


class Observation:
    """The Gram matrix of each FFN over most windows, and its activations in those held out."""

    def __init__(self, is_held_out_N: Tensor, ffns: int) -> None:
        self.gram_E = [GramSums() for _ in range(ffns)]
        self.device = torch.device("cpu")
        self._is_held_out_N = is_held_out_N
        self._held_out_E: list[list[Tensor]] = [[] for _ in range(ffns)]

    def add(self, ffn: int, act_RF: Tensor, window_R: Tensor) -> None:
        """Add rows of the activations of one FFN, and which window each is of."""
        self.device = act_RF.device
        # Rows of a dense FFN are told on the CPU, so that no accelerator is waited for.
        self._is_held_out_N = self._is_held_out_N.to(window_R.device)
        held_out_R = self._is_held_out_N[window_R]
        if bool(held_out_R.any()):
            self._held_out_E[ffn].append(act_RF[_places(held_out_R, act_RF.device)])
            act_RF = act_RF[_places(~held_out_R, act_RF.device)]
        if act_RF.shape[0]:
            self.gram_E[ffn].add(act_RF)

    def add_up_at(self, rank: int, team: Team, width: int, device: torch.device) -> None:
        """Bring what all processes observed together at one; see `GramSums.add_up_at`."""
        if team.size == 1:
            return
        self.device = device
        for gram in self.gram_E:
            gram.add_up_at(rank, team, width, device)
        own_E = [[part.cpu() for part in parts] for parts in self._held_out_E]
        self._held_out_E = [[] for _ in self._held_out_E]
        for of_process in team.gather(own_E, at=rank):
            for parts, more in zip(self._held_out_E, of_process, strict=True):
                parts += [part.to(device) for part in more]

    def held_out_RF(self, ffn: int, width: int) -> Tensor:
        """Return the held-out activations of one FFN; no rows if there are none."""
        none = torch.zeros(0, width, device=self.device)
        return torch.cat(self._held_out_E[ffn] or [none])


def _tiles(channels: int) -> Iterator[tuple[int, int]]:
    size = min(_LARGEST_TILE, -(-channels // _TILES))
    for start in range(0, channels, size):
        yield start, min(start + size, channels)


def _places(is_in_R: Tensor, device: torch.device) -> Tensor:
    """Return which rows are in, on a device."""
    return is_in_R.nonzero().flatten().to(device)


def exact_fast_matmul(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Multiply float32 copies of 16-bit values at 16-bit speed, without losing a bit.

    bfloat16 values survive the rounding of inputs to bfloat16 (oneDNN on a CPU) or to TF32
    (CUDA) unchanged, and float16 values that to TF32; products are summed in float32 either
    way. On a CPU with native bfloat16 this is about twice as fast. The setting is put back.
    """
    backends: Any = torch.backends
    if device.type == "cpu" and dtype == torch.bfloat16:
        return multiplying_in("bf16", backends.mkldnn.matmul)
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return multiplying_in("tf32", backends.cuda.matmul)
    return nullcontext()


@dataclass(frozen=True)
class RidgeSolution:
    """A repaired down projection and how well it does."""

    down_DK: Tensor  # the new weights, in the dtype of the old
    ridge: float | None  # the chosen lambda; None if no strength was better than none at all
    # Relative squared error of the FFN's output on held-out tokens, with the channels removed and
    # nothing else done, and with the new weights, which is never larger.
    error_before: float
    error_after: float
    energy: float  # sum of squares of the FFN's output on held-out tokens


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
    kept_RK, target_RD = held_out_RF.index_select(1, kept_K), _output(held_out_RF, down_DF)
    target_of_rows = torch.split(target_RD, ROWS)
    energy = sum(_squares(target) for target in target_of_rows)

    def error_of(new_DK: Tensor) -> float:
        # A few rows at a time: an output of all, in float64, would be the most that there is.
        pairs = zip(torch.split(kept_RK, ROWS), target_of_rows, strict=True)
        squares = sum(_squares(_output(rows, new_DK) - target) for rows, target in pairs)
        return squares / energy if energy > 0 else 0.0

    error = error_of(plain_DK)
    best = RidgeSolution(plain_DK, None, error, error, energy)
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

    descend(error_with, len(lambdas))
    return best


def _squares(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def descend(error_with: Callable[[int], float], count: int) -> None:
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

"""Streaming statistics of one block: sums only, so that parts of a text can be added up.

Shapes: B windows, T tokens, D hidden, F FFN channels.

Sums of a batch are kept as float32 and added up in float64, which is exact while they differ by
less than 2^29: the order in which batches come, and so the number of processes, leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.statistics import BlockStatistics, ObservedBlock, UnitStatistics
from cfsp.errors import CalibrationError
from cfsp.settings import DISTANCES

if TYPE_CHECKING:
    from cfsp.architecture.found import Unit

# Rows of activations that are summed at once: on a CPU their float32 copy should stay in the cache,
# an accelerator is given few and large things to do.
_ROWS, _ROWS_ELSEWHERE = 256, 4096


class DistanceSums:
    """Distances between a block's input and output hidden states, summed over tokens.

    Per token, in float32, with h the input and h' the output (D values each):

        angular    arccos(clamp(cos(h, h'), -1, 1)) / pi   (CFSP Eq. 3, in [0, 1])
        cosine     1 - cos(h, h')
        euclidean  |h' - h| / |h|
        mse        mean over D of (h' - h)^2
        mae        mean over D of |h' - h|
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | None = None

    def add(self, input_BTD: Tensor, output_BTD: Tensor) -> None:
        """Add the tokens of one batch."""
        before = input_BTD.flatten(0, 1).float()
        after = output_BTD.flatten(0, 1).float()
        difference = after - before
        before_norm = torch.linalg.vector_norm(before, dim=1)
        after_norm = torch.linalg.vector_norm(after, dim=1)
        tiny = torch.finfo(torch.float32).tiny
        cosine = (before * after).sum(1) / (before_norm * after_norm).clamp_min(tiny)
        cosine = cosine.clamp(-1.0, 1.0)
        squares = difference.square()
        values = {
            "angular": torch.arccos(cosine) / math.pi,
            "cosine": 1.0 - cosine,
            "euclidean": squares.sum(1).sqrt() / before_norm.clamp_min(tiny),
            "mse": squares.mean(1),
            "mae": difference.abs().mean(1),
        }
        # Kept where it was computed: to ask an accelerator for a number is to wait for it.
        added = torch.stack([values[name].sum(dtype=torch.float64).float() for name in DISTANCES])
        self._total = added.double() if self._total is None else self._total + added
        self.tokens += before.shape[0]

    @property
    def sums(self) -> dict[str, float]:
        """Sum of each distance over all tokens added so far."""
        if self._total is None:
            return dict.fromkeys(DISTANCES, 0.0)
        return dict(zip(DISTANCES, self._total.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """Return the mean of each distance over all tokens added so far."""
        return {name: total / self.tokens for name, total in self.sums.items()}


class ChannelSums:
    """Sum of squares of every FFN channel's activation over all tokens.

    The channels of a block with several FFNs (experts) are numbered through, one FFN after the
    other.

    Attributes:
        tokens_E: tokens that each FFN has seen.
        sum_of_squares_F: float64; None before the first tokens.
    """

    def __init__(self, ffns: int = 1) -> None:
        self.tokens_E = [0] * ffns
        self.sum_of_squares_F: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Tokens seen by all FFNs together."""
        return sum(self.tokens_E)

    def add(self, act_BTF: Tensor, ffn: int = 0) -> None:
        """Add tokens of one batch: the input of the down projection of one FFN."""
        rows = act_BTF.flatten(0, -2)
        width = rows.shape[1]
        if self.sum_of_squares_F is None:
            channels = len(self.tokens_E) * width
            self.sum_of_squares_F = torch.zeros(channels, dtype=torch.float64, device=rows.device)
        own = slice(ffn * width, (ffn + 1) * width)
        for part in torch.split(rows, _ROWS if rows.device.type == "cpu" else _ROWS_ELSEWHERE):
            # Not in place: of float32 activations `float` gives the block's own tensor, no copy.
            self.sum_of_squares_F[own] += part.float().square().sum(0)
        self.tokens_E[ffn] += rows.shape[0]


class OutputNorms:
    """Sum of the L2 norm of what every expert of a block adds, over the tokens routed to it.

    What it adds is its output times the router's weight.

    Args:
        experts_U: how many experts of each unit of the block can go whole; 0 where none can.

    Attributes:
        norm_UE: the sums of each unit, float64.
    """

    def __init__(self, experts_U: Sequence[int]) -> None:
        self.norm_UE = [torch.zeros(experts, dtype=torch.float64) for experts in experts_U]

    def add(self, unit: int, expert: int, output_RD: Tensor, token_R: Tensor) -> None:
        """Add tokens of one batch: what one expert adds."""
        if not len(self.norm_UE[unit]):
            return
        norm_R = torch.linalg.vector_norm(output_RD.float(), dim=1)
        self.norm_UE[unit] = norm_E = self.norm_UE[unit].to(norm_R.device)
        norm_E[expert] += norm_R.sum(dtype=torch.float64).float()


class BlockSums:
    """All sums of one block.

    Attributes:
        distances: of the block.
        channels: of each of its units.
        sublayers: distances of each unit, where it is an attention.
        outputs: of experts.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self.distances = DistanceSums()
        self.channels = [ChannelSums(unit.ffns) for unit in units]
        self.sublayers = [DistanceSums() for _ in units]
        self.outputs = OutputNorms([unit.removable_experts for unit in units])

    def observed(self, block: int, passing: Tensor | None = None) -> ObservedBlock:
        """Return the statistics of the block.

        Args:
            block: its index.
            passing: see `ObservedBlock`.

        Raises:
            CalibrationError: an activation was NaN or infinite.
        """
        distance_sums, tokens = self.distances.sums, self.distances.tokens
        units = []
        for unit, sums, sublayer, norm_E in zip(
            self._units, self.channels, self.sublayers, self.outputs.norm_UE, strict=True
        ):
            squares_F = sums.sum_of_squares_F
            if squares_F is None:
                squares_F = torch.zeros(unit.ffns * unit.columns, dtype=torch.float64)
            units.append(
                UnitStatistics(
                    block=block,
                    sum_of_squares_F=squares_F.cpu(),
                    tokens=tokens,
                    routed_E=tuple(sums.tokens_E) if unit.ffns > 1 else (),
                    part=unit.part,
                    distance_sums=sublayer.sums if unit.after is not None else {},
                    output_norm_E=norm_E.cpu(),
                )
            )
        if not all(map(math.isfinite, distance_sums.values())) or not all(
            bool(torch.isfinite(unit.sum_of_squares_F).all()) for unit in units
        ):
            raise CalibrationError(
                f"block {block} produced NaN or infinite activations; "
                "calibrate with --dtype float32 or bfloat16"
            )
        return ObservedBlock(BlockStatistics(distance_sums, tokens), tuple(units), passing)

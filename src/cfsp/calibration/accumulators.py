"""Streaming statistics of one block: sums only, so that parts of a text can be added up.

Shapes: B windows, T tokens, S tokens of a sample, D hidden, F FFN channels, E experts, U units.

Sums of a batch are kept as float32 and added up in float64, which is exact while they differ by
less than 2^29: the order in which batches come, and so the number of processes, leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cfsp.architecture.found import Unit
from cfsp.calibration.observed import BlockStatistics, ObservedBlock, UnitStatistics
from cfsp.calibration.statistics import RunDistances
from cfsp.calibration.together import added_up
from cfsp.errors import CalibrationError
from cfsp.processes import Team
from cfsp.text.windows import Windows

# Rows of activations that are summed at once: on a CPU their float32 copy should stay in the cache,
# an accelerator is given few and large things to do.
_ROWS, _ROWS_ELSEWHERE = 256, 4096
# In all: their hidden states at every block are in memory.
SAMPLED_TOKENS = 1024


class DistanceSum:
    """Angular distance between a block's input and output hidden states, summed over tokens.

    Per token, in float32, with h the input and h' the output (D values each):

        arccos(clamp(cos(h, h'), -1, 1)) / pi   (CFSP Eq. 3, in [0, 1])
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | None = None

    def add(self, input_BTD: Tensor, output_BTD: Tensor) -> None:
        """Add the tokens of one batch."""
        before = input_BTD.flatten(0, 1).float()
        after = output_BTD.flatten(0, 1).float()
        before_norm = torch.linalg.vector_norm(before, dim=1)
        after_norm = torch.linalg.vector_norm(after, dim=1)
        tiny = torch.finfo(torch.float32).tiny
        cosine = (before * after).sum(1) / (before_norm * after_norm).clamp_min(tiny)
        angular = torch.arccos(cosine.clamp(-1.0, 1.0)) / math.pi
        # Kept where it was computed: to ask an accelerator for a number is to wait for it.
        added = angular.sum(dtype=torch.float64).float()
        self._total = added.double() if self._total is None else self._total + added
        self.tokens += before.shape[0]

    @property
    def total(self) -> float:
        """Sum over all tokens added so far."""
        return 0.0 if self._total is None else float(self._total)


class ChannelSums:
    """Sum of squares of every FFN channel's activation over all tokens, float64.

    The channels of a block with several FFNs (experts) are numbered through, one FFN after the
    other.
    """

    def __init__(self, ffns: int = 1) -> None:
        self.tokens_E = [0] * ffns
        self.sum_of_squares_F: Tensor | None = None

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

    What it adds is its output times the router's weight. It is made from how many experts of each
    unit can go whole; the sums are float64.
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
    """All sums of one block."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self.distance = DistanceSum()
        self.channels = [ChannelSums(unit.ffns) for unit in units]
        # Where it is an attention.
        self.sublayers = [DistanceSum() for _ in units]
        self.outputs = OutputNorms([unit.removable_experts for unit in units])

    def observed(self, block: int, passing: Tensor | None = None) -> ObservedBlock:
        """Return the statistics of the block at an index; for `passing` see `ObservedBlock`."""
        distance_sum, tokens = self.distance.total, self.distance.tokens
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
                    distance_sum=sublayer.total if unit.after is not None else None,
                    output_norm_E=norm_E.cpu(),
                )
            )
        if not math.isfinite(distance_sum) or not all(
            bool(torch.isfinite(unit.sum_of_squares_F).all()) for unit in units
        ):
            raise CalibrationError(
                f"block {block} produced NaN or infinite activations; "
                "calibrate with --dtype float32 or bfloat16"
            )
        return ObservedBlock(BlockStatistics(distance_sum, tokens), tuple(units), passing)


# How far runs of blocks turn the hidden state. What enters the first block of a run and what leaves
# the last are many blocks apart, so the hidden states of some tokens are kept at every block.


def sampled_stride(windows: Windows) -> int:
    """Return of how many tokens of every window one is looked at."""
    count, seqlen = windows.tokens_NT.shape
    return max(1, min(seqlen, count * seqlen // SAMPLED_TOKENS))


def sampled(stride: int, *states_BTD: Tensor) -> Tensor:
    """Return one of so many tokens of each of several hidden states, on the CPU, 2 x S x D.

    The first is amid the first so many: the first token of a window is unlike all others.
    """
    rows = [states[:, stride // 2 :: stride].flatten(0, 1) for states in states_BTD]
    return torch.stack(rows).cpu()


def run_distances(
    observed: Sequence[ObservedBlock], team: Team, device: torch.device
) -> RunDistances:
    """Return the angular distances over all runs of blocks, of the tokens of all processes."""
    passing_L = [block.passing for block in observed if block.passing is not None]
    sums = torch.zeros(len(observed) + 1, len(observed) + 1, dtype=torch.float64)
    tokens = 0
    if passing_L:  # else this process has no window
        states = [passing_L[0][0], *(passing[1] for passing in passing_L)]
        unit = [torch.nn.functional.normalize(state.float(), dim=-1) for state in states]
        tokens = len(unit[0])
        for first, before_SD in enumerate(unit):
            for end in range(first + 1, len(unit)):
                cosine_S = (before_SD * unit[end]).sum(-1).clamp(-1.0, 1.0)
                sums[first, end] = (torch.arccos(cosine_S) / math.pi).double().sum()
    own = torch.cat([sums.flatten(), torch.tensor([tokens], dtype=torch.float64)])
    total = added_up(own, team, device)
    rows = total[:-1].view(sums.shape).tolist()
    return RunDistances(tuple(map(tuple, rows)), int(total[-1]))

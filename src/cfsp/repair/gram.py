"""What the repair of an FFN unit needs of its windows: Gram matrices of most, a few whole.

Shapes: N windows, R rows (tokens of a batch), F FFN channels, E FFNs of the unit (1, or its
experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from cfsp.processes import Team

# Tiles of the upper triangle: at 4 tiles a side, 10 of 16 are computed.
_TILES = 4
_LARGEST_TILE = 2048
# Rows that are float32 at once: a batch of 4096 would be another 0.2 GB at 14336 channels.
ROWS = 1024


class GramSums:
    """Sum over tokens of x xᵀ, float32, F x F; only the upper triangle until it is complete."""

    def __init__(self) -> None:
        self.tokens = 0
        self._gram_FF: Tensor | None = None

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
        """Make the sums of one process those of all; the others have none any more.

        A process without a row is told how many channels there are, and where it computes.
        """
        if team.size == 1:
            return
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
        """Return the complete mean E[x xᵀ]; the sums are used up, so that memory holds one."""
        assert self._gram_FF is not None
        gram_FF, self._gram_FF = self._gram_FF, None
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


@contextmanager
def exact_fast_matmul(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Multiply float32 copies of 16-bit values at 16-bit speed, without losing a bit.

    bfloat16 values survive the rounding of inputs to bfloat16 (oneDNN on a CPU) or to TF32
    (CUDA) unchanged, and float16 values that to TF32; products are summed in float32 either
    way. On a CPU with native bfloat16 this is about twice as fast. The setting is put back.
    """
    backends: Any = torch.backends
    backend: Any = None
    if device.type == "cpu" and dtype == torch.bfloat16:
        backend, precision = backends.mkldnn.matmul, "bf16"
    elif device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        backend, precision = backends.cuda.matmul, "tf32"
    if backend is None:
        yield
        return
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before

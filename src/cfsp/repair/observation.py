"""What the repair of an FFN unit needs of its windows: Gram matrices of most, a few whole.

Shapes: E FFNs of the unit (1, or its experts), R rows (tokens), F FFN channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfsp.processes import Team
from cfsp.repair.gram import GramSums


class Observation:
    """The Gram matrix and held-out activations of each FFN.

    Attributes:
        gram_E: sums over the windows that are not held out.
        device: where the activations are.
    """

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
        """Bring what all processes observed together at one.

        Args:
            rank: of that process.
            team: the processes.
            width: channels of an FFN.
            device: where the process computes.
        """
        if team.size == 1:
            return
        self.device = device
        for gram in self.gram_E:
            gram.add_up_at(rank, team, width, device)
        own_E = [[part.cpu() for part in parts] for parts in self._held_out_E]
        self._held_out_E = [[] for _ in self._held_out_E]
        for of_process in team.gather_at(rank, own_E):
            for parts, more in zip(self._held_out_E, of_process, strict=True):
                parts += [part.to(device) for part in more]

    def held_out_rows(self, ffn: int) -> int:
        """Return how many held-out tokens one FFN saw."""
        return sum(len(part) for part in self._held_out_E[ffn])

    def held_out_RF(self, ffn: int, width: int) -> Tensor:
        """Return the held-out activations of one FFN; no rows if there are none."""
        none = torch.zeros(0, width, device=self.device)
        return torch.cat(self._held_out_E[ffn] or [none])


def _places(is_in_R: Tensor, device: torch.device) -> Tensor:
    """Return which rows are in, on a device."""
    return is_in_R.nonzero().flatten().to(device)

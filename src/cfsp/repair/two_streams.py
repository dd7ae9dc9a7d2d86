"""A pruned block between two streams of the same windows: the dense model's, and the pruned one's.

Row n of the hidden states is the process's window n of the text in the dense stream; all rows of
the pruned stream come behind those.

Shapes: B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cfsp.checkpoint.reading import read_tensors
from cfsp.checkpoint.skeleton import fill
from cfsp.cut.surgery import PrunedSource
from cfsp.processes import Team
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.runtime import no_number
from cfsp.text.windows import Windows


class Split:
    """The windows of a text in batches of so many; to some nothing is fitted.

    Those of one of several processes: of all processes `every_held_out` are held out.
    """

    def __init__(self, windows: Windows, batch: int, team: Team) -> None:
        every, self.seqlen = windows.tokens_NT.shape
        self.team, self._batch = team, batch
        own = team.share(every, batch)
        self.windows, self.count = windows.part(own), own.stop - own.start
        self.every_held_out = int(windows.held_out_N.sum())
        self.held_out: list[int] = windows.held_out_N[own].nonzero().flatten().tolist()
        self.batches, self.judged = self._batched(range(self.count)), self._batched(self.held_out)
        # All numbers of windows that blocks are ever called with.
        self.batch_sizes = {*map(len, self.batches), *map(len, self.judged)}

    def _batched(self, windows: Sequence[int]) -> list[list[int]]:
        return [list(windows[i : i + self._batch]) for i in range(0, len(windows), self._batch)]


def token_error(output_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return |output - dense| / |dense| of each token, averaged, in float32.

    Relative to each token: the first tokens of a window have a thousand times the energy of the
    others, or more, and would be all that counts.
    """
    dense = dense_BTD.float()
    difference = output_BTD.float() - dense
    energy = dense.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return (difference.square().sum(-1) / energy).sqrt().mean()


def hidden_loss(output_BTD: Tensor, dense_BTD: Tensor) -> Tensor:
    """Return the error of each token, averaged, and that of all together, added.

    The second guards the few tokens of huge energy, which attention of other tokens rests on: if
    they lose it, or others gain it, all later blocks break, and one in a thousand hardly shows in
    the first.
    """
    dense = dense_BTD.float()
    energy = dense.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    whole = ((output_BTD.float() - dense).square().sum() / energy).sqrt()
    return token_error(output_BTD, dense_BTD) + whole


@dataclass(frozen=True)
class Judgement:
    """How far a block's hidden states are from the dense model's, on held-out windows."""

    error: float  # `token_error`
    loss: float  # `hidden_loss`, which is to become less

    @property
    def is_finite(self) -> bool:
        """Whether neither is NaN or infinite."""
        return math.isfinite(self.error) and math.isfinite(self.loss)


class BlockVisit:
    """A pruned block with its weights, called as the model calls it, and both streams around it.

    `index` is that of the block in the pruned model, `kept_index` that in the dense one. The dense
    stream has passed that block, and what was removed behind it.
    """

    def __init__(
        self,
        pruned: PrunedSource,
        module: nn.Module,
        index: int,
        kept_index: int,
        block: StreamedBlock,
        split: Split,
    ) -> None:
        self.module, self.index, self.split, self.device = module, index, split, block.device
        self._pruned, self._block = pruned, block
        self._calls = {size: block.calls.of(kept_index, size) for size in split.batch_sizes}
        self.fill()

    def __call__(self, hidden_BTD: Tensor) -> Tensor:
        """Return the block's output."""
        return self._calls[len(hidden_BTD)](self.module, hidden_BTD)

    def fill(self, instead: Mapping[str, Tensor] | None = None) -> None:
        """Compute with the pruned model's tensors, but for some new ones by origin."""
        prefix = self._pruned.architecture.block_prefix(self.index)
        tensors = read_tensors(self.module, prefix, self._pruned, self._block.dtype, instead)
        fill(self.module, tensors, self.device)

    def batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """Return what of some windows enters the pruned block, and their dense stream after it."""
        hidden = self._block.hidden
        input_BTD = hidden.read([self.split.count + window for window in windows])
        return input_BTD.to(self.device), hidden.read(windows).to(self.device)

    def judge(self) -> Judgement:
        """Return how far the block is from the dense stream on the held-out windows of all."""
        error, loss, every = 0.0, 0.0, self.split.every_held_out
        for windows in self.split.judged:
            (input_BTD, dense_BTD), share = self.batch(windows), len(windows) / every
            output_BTD = self(input_BTD)
            error += share * float(token_error(output_BTD, dense_BTD))
            loss += share * float(hidden_loss(output_BTD, dense_BTD))
        of_processes = self.split.team.gather((error, loss))
        return Judgement(*map(math.fsum, zip(*of_processes, strict=True)))

    def judge_unchanged(self) -> Judgement:
        """Return the same of the block as it is, which must give numbers."""
        judgement = self.judge()
        if not judgement.is_finite:
            block = self._block
            raise no_number(
                f"block {block.index} produced NaN or infinite activations", block.dtype
            )
        return judgement

    def accept(self, before: Judgement, tensors: Mapping[str, Tensor]) -> Judgement | None:
        """Take new tensors, by origin, if held-out windows lose less; else return None."""
        self.fill(tensors)
        after = self.judge()
        if after.is_finite and after.loss < before.loss:
            return after
        self.fill()
        return None

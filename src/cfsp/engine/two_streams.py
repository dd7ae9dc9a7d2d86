"""The windows of a pass that carries two streams: through a dense model, and through a pruned one.

The pass has every window twice. Of its 2 N windows the first N are the dense stream, the others
the pruned. Some batches are held out from training.

Shapes: N windows, B windows in a batch, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HELD_OUT_STRIDE = 8


@dataclass(frozen=True)
class TwoStreams:
    """Which windows of a pass over two streams are what.

    Attributes:
        windows: N.
        seqlen: T.
        batch: B, a divisor of N.
    """

    windows: int
    seqlen: int
    batch: int

    @staticmethod
    def of(tokens_NT: Tensor, asked: int) -> TwoStreams:
        """Return streams of whole batches; the last windows may be left over.

        Args:
            tokens_NT: the windows.
            asked: windows in a batch; fewer where too few batches would be left.
        """
        count, seqlen = tokens_NT.shape
        batch = max(1, min(asked, count // _HELD_OUT_STRIDE))
        return TwoStreams(count // batch * batch, seqlen, batch)

    def doubled(self, tokens_NT: Tensor) -> Tensor:
        """Return the windows of both streams, without those that are left over."""
        own_NT = tokens_NT[: self.windows]
        return torch.cat([own_NT, own_NT])

    @property
    def tokens(self) -> int:
        """Tokens of both streams."""
        return 2 * self.windows * self.seqlen

    @property
    def dense(self) -> list[slice]:
        """The batches of the dense stream."""
        return [slice(i, i + self.batch) for i in range(0, self.windows, self.batch)]

    def pruned(self, dense: slice) -> slice:
        """Return where the pruned stream has the windows of a batch of the dense stream."""
        return slice(self.windows + dense.start, self.windows + dense.stop)

    @property
    def held_out(self) -> list[slice]:
        """Batches of the dense stream that training does not see: every eighth."""
        batches = self.dense
        stride = min(_HELD_OUT_STRIDE, len(batches))
        return batches[stride - 1 :: stride]

    @property
    def trained(self) -> list[int]:
        """Windows of the dense stream that training sees."""
        held_out = {i for batch in self.held_out for i in range(batch.start, batch.stop)}
        return [i for i in range(self.windows) if i not in held_out]

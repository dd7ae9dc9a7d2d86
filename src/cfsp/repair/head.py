"""The loss of what a model predicts from the hidden states that leave its last block.

Shapes: B windows in a batch, T tokens, P positions in a window, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.streaming.head import Head

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.group_visit import Batch
    from cfsp.streaming.runtime import Runtime

# Predictions that count in a batch, at least. The head is a large part of a small model's
# arithmetic.
_PREDICTIONS = 256


class HeadLoss:
    """How far predictions are from those of the dense model, and from the text.

    Args:
        source: the dense model; what lies around its blocks is read.
        runtime: where and in what the head computes; the loss is in float32.
        text: the part of the text in the loss, from 0 to 1.
    """

    def __init__(self, source: WeightSource, runtime: Runtime, text: float) -> None:
        self._head = Head(source, runtime.device, runtime.dtype)
        self._text = text

    def __call__(self, output_BTD: Tensor, batch: Batch) -> Tensor:
        """Return the loss of the next token's predictions, the mean over some positions, in nats.

            (1 - text) KL(dense || output) - text log p(next token)

        Neighbours are alike, so that every batch is judged at a few positions, others in each
        turn.

        Args:
            output_BTD: hidden states after the last block; gradients reach them.
            batch: with the text and the hidden states of the dense model.
        """
        windows, length = batch.tokens_BT.shape
        # What follows the last token is not known.
        stride = min(length - 1, max(1, windows * length // _PREDICTIONS))
        first = batch.turn % stride
        position_P = torch.arange(first, length - 1, stride, device=output_BTD.device)
        log_probability_BPV = self._log_probabilities(output_BTD, position_P)
        with torch.no_grad():
            expected_BPV = self._log_probabilities(batch.dense_BTD, position_P)
        divergence_BP = torch.linalg.vecdot(expected_BPV.exp(), expected_BPV - log_probability_BPV)
        next_BP1 = batch.tokens_BT[:, position_P + 1].unsqueeze(-1)
        text_BP = -log_probability_BPV.gather(-1, next_BP1).squeeze(-1)
        loss_BP = (1 - self._text) * divergence_BP + self._text * text_BP
        loss: Tensor = loss_BP.mean()
        return loss

    def _log_probabilities(self, hidden_BTD: Tensor, position_P: Tensor) -> Tensor:
        hidden_BPD = hidden_BTD[:, position_P]
        logits_RV = self._head.logits(hidden_BPD.flatten(0, 1))  # all positions of the batch
        return logits_RV.float().log_softmax(-1).view(*hidden_BPD.shape[:2], -1)

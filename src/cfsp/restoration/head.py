"""What a model's predictions make of the hidden states that leave its last block.

The model's own forward runs with its blocks left out, so that no family's last norm, scaling or
head needs to be known.

Shapes: B windows in a batch, T tokens, P positions in a window, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.resumed_forward import resumed_at
from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, fill_around_blocks

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource

# Predictions that are compared in a batch, at least. Neighbours are alike, and the head is a large
# part of a small model's arithmetic.
_PREDICTIONS = 256


class HeadDivergence:
    """How far predictions from some hidden states are from those of the dense model's.

    Args:
        source: the model; what lies around its blocks is read.
        device: where to compute.
        dtype: what the head computes in; the divergence is in float32.
    """

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        # Autograd refuses the tensors of inference mode, which passes run in.
        with torch.inference_mode(mode=False):
            self._model = build_skeleton(source.config, dtype)
            fill_around_blocks(self._model, source, dtype, device)
        self._blocks = blocks_of(self._model, source.family)
        self._dtype = dtype

    def __call__(self, output_BTD: Tensor, target_BTD: Tensor) -> Tensor:
        """Return KL(target || output) of the next token, the mean over some positions, in nats.

        Args:
            output_BTD: hidden states after the last block; gradients reach them.
            target_BTD: those of the dense model.
        """
        with torch.no_grad():
            expected_BPV = self._log_probabilities(target_BTD)
        log_probability_BPV = self._log_probabilities(output_BTD)
        divergence_BP = torch.linalg.vecdot(expected_BPV.exp(), expected_BPV - log_probability_BPV)
        divergence: Tensor = divergence_BP.mean()
        return divergence

    def _log_probabilities(self, hidden_BTD: Tensor) -> Tensor:
        windows, length = hidden_BTD.shape[:2]
        stride = min(length, max(1, windows * length // _PREDICTIONS))
        position_P = torch.arange(stride - 1, length, stride, device=hidden_BTD.device)
        hidden_BTD = hidden_BTD.to(self._dtype)
        device = hidden_BTD.device.type
        # Which tokens they are does not matter any more.
        tokens_BT = position_P.new_zeros(hidden_BTD.shape[:2])
        with (
            torch.autocast(device, enabled=False),
            resumed_at(self._blocks, len(self._blocks), hidden_BTD),
        ):
            output = self._model(input_ids=tokens_BT, use_cache=False, logits_to_keep=position_P)
        log_probability_BPV: Tensor = output.logits.float().log_softmax(-1)
        return log_probability_BPV

"""What a model predicts from the hidden states that leave its last block.

Shapes: P positions of any windows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cfsp.architecture.small_run import set_parameter
from cfsp.checkpoint.reading import read_parameter
from cfsp.checkpoint.skeleton import build_skeleton
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.streaming.decoder_end import DecoderEnd, parameters_of_end

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource


class Head:
    """All of a model that comes after its last block.

    Args:
        source: the model; what lies around its blocks is read.
        device: where to compute.
        dtype: what to compute in.

    Attributes:
        vocabulary: V.
    """

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype) -> None:
        # Autograd refuses the tensors of inference mode, which passes run in.
        with torch.inference_mode(mode=False):
            model = build_skeleton(source.config, dtype)
            found = source.architecture
            names = parameters_of_end(model, found.decoder, found.blocks)
            for name in names:
                tensor = read_parameter(source, name, dtype).to(device)
                set_parameter(model, name, nn.Parameter(tensor, requires_grad=False))
        self._end = DecoderEnd(model, found.decoder, found.blocks, device)
        self._dtype = dtype
        self.vocabulary = vocabulary_of(source.config)

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Return the logits of the tokens that follow, PV, in the head's dtype.

        Args:
            hidden_PD: hidden states after the last block; gradients reach them.
        """
        with torch.autocast(hidden_PD.device.type, enabled=False):
            return self._end.logits(hidden_PD.to(self._dtype))

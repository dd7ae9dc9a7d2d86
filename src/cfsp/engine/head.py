"""What a model predicts from the hidden states that leave its last block.

The model's own forward runs with its blocks left out, so that no family's last norm, scaling,
soft-capping or head needs to be known.

Shapes: P positions of any windows, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.checkpoint.skeleton import blocks_of, build_skeleton, fill_head
from cfsp.engine.resumed_forward import resumed_at

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
            self._model = build_skeleton(source.config, dtype)
            fill_head(self._model, source, dtype, device)
        self._blocks = blocks_of(self._model, source.architecture)
        self._dtype = dtype
        embeddings = self._model.get_input_embeddings()
        assert isinstance(embeddings, torch.nn.Embedding)
        self._embedded = embeddings.embedding_dim
        self.vocabulary = int(source.config.vocab_size)

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Return the logits of the tokens that follow, PV, in the head's dtype.

        Args:
            hidden_PD: hidden states after the last block; gradients reach them.
        """
        # Nothing after the blocks looks at other positions, so each is a window of its own.
        hidden_P1D = hidden_PD.to(self._dtype).unsqueeze(1)
        # Which tokens they are does not matter any more.
        embedded_P1D = hidden_P1D.new_zeros(len(hidden_P1D), 1, self._embedded)
        with (
            torch.autocast(hidden_P1D.device.type, enabled=False),
            resumed_at(self._blocks, len(self._blocks), hidden_P1D),
        ):
            output = self._model(inputs_embeds=embedded_P1D, use_cache=False)
        logits_PV: Tensor = output.logits[:, 0]
        return logits_PV

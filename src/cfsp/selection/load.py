"""The whole model in memory; one that does not fit is refused before it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.streaming.call_form import find_call_form
from cfsp.streaming.decoder_end import logits_only
from cfsp.streaming.runtime import check_fits
from cfsp.streaming.stand_in import CallForm

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime


def load_whole(source: WeightSource, runtime: Runtime, purpose: str) -> PreTrainedModel:
    """Return the whole model of a source, ready to run; one in memory is itself.

    Args:
        source: the model.
        runtime: where and in what.
        purpose: what needs it, for the error.

    Raises:
        UsageError: it does not fit into memory.
    """
    if isinstance(source, LoadedModel):
        return source.model
    assert isinstance(source, Checkpoint)
    check_fits(source, runtime, purpose)
    return load(source.directory, dtype=runtime.dtype, device=runtime.device)


@torch.inference_mode()
def call_form_of(model: PreTrainedModel, blocks: nn.ModuleList) -> CallForm:
    """Return how a whole model takes hidden states from its blocks; see `find_call_form`."""

    def logits(tokens_BT: Tensor) -> Tensor:
        found: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
        return found

    with logits_only(model):
        return find_call_form(logits, blocks, model.device)

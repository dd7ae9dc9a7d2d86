"""The whole model in memory, and how far a changed one's predictions are from its own.

The Kullback-Leibler divergence of the next-token distribution, KL(dense || changed), in nats per
token. It is never negative and has far less noise than a difference of losses, so that few
windows tell small changes apart.

Shapes: B windows, T tokens, P positions in a window, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint, LoadedModel, WeightSource
from cfsp.streaming.decoder_end import logits_only, text_model
from cfsp.streaming.runtime import Runtime, check_fits
from cfsp.streaming.stand_in import CallForm, find_call_form, resumed_at
from cfsp.text.windows import Windows, few_windows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# At least so many windows are compared, or as many as texts, and of each this beginning. The
# divergence has little noise (LOG.md), and each window costs a forward pass for every change.
LEAST_WINDOWS = 8
BEGINNING_TOKENS = 256

# Predictions of neighbours are alike: of every few tokens one is compared, which keeps the cost
# of a large vocabulary small.
POSITION_STRIDE = 4

# In nats: equal predictions, but for rounding.
_SAME = 1e-4


def load_whole(source: WeightSource, runtime: Runtime, purpose: str) -> PreTrainedModel:
    """Return the whole model of a source, ready to run; one in memory is itself."""
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


@dataclass(frozen=True)
class DensePredictions:
    """What the dense model predicts after every `POSITION_STRIDE`-th token of some windows."""

    tokens_BT: Tensor
    probability_BPV: Tensor  # of the next token, float32
    negative_entropy_BP: Tensor  # sum over the vocabulary of p log p, float32

    def divergence(self, model: PreTrainedModel) -> float:
        """Return KL(dense || model), the mean over positions, in nats per token."""
        logits_BPV = _logits(model, self.tokens_BT)
        expected_BP = torch.linalg.vecdot(self.probability_BPV, logits_BPV)
        divergence_BP = self.negative_entropy_BP - expected_BP + logits_BPV.logsumexp(-1)
        return float(divergence_BP.double().mean())


def dense_predictions(model: PreTrainedModel, tokens_BT: Tensor) -> DensePredictions:
    """Return what a model predicts, to compare changed ones with."""
    probability_BPV = _logits(model, tokens_BT).softmax(-1)
    negative_entropy_BP = torch.xlogy(probability_BPV, probability_BPV).sum(-1)
    return DensePredictions(tokens_BT, probability_BPV, negative_entropy_BP)


def windows_compared(sources: int) -> int:
    """Return on how many windows models are compared, of a text from so many sources."""
    return max(LEAST_WINDOWS, sources)


def prediction_bytes(vocabulary: int) -> int:
    """Return what comparing the predictions of one window takes in memory, at most.

    Probabilities of the dense model, logits of the changed one as computed and in float32, and
    their exponentials.
    """
    return 4 * 4 * (BEGINNING_TOKENS // POSITION_STRIDE) * vocabulary


def few_beginnings(windows: Windows, tokens: int = BEGINNING_TOKENS) -> Windows:
    """Return the beginnings of a few windows: more kinds of text in the same time."""
    few = few_windows(windows, windows_compared(len(windows.sources)))
    return replace(few, tokens_NT=few.tokens_NT[:, :tokens])


def can_resume(
    model: PreTrainedModel,
    blocks: nn.ModuleList,
    entering_BTD: Tensor,
    form: CallForm,
    dense: DensePredictions,
) -> bool:
    """Return whether the last block needs nothing of those before but a hidden state.

    Some models take keys and values from an earlier block. `entering_BTD` enters the last one of
    the dense model, which predicts `dense`.
    """
    try:
        with resumed_at(blocks, len(blocks) - 1, entering_BTD, form):
            return abs(dense.divergence(model)) < _SAME
    except Exception:  # however a model misses what its stand-ins do not leave
        return False


def _logits(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    position_P = torch.arange(0, tokens_BT.shape[1], POSITION_STRIDE, device=model.device)
    output = text_model(model)(
        input_ids=tokens_BT.to(model.device), use_cache=False, logits_to_keep=position_P
    )
    logits_BPV: Tensor = output.logits.float()
    return logits_BPV

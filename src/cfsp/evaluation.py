"""Perplexity of whole models on text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfsp.calibration.calibrate import check_vocabulary_size
from cfsp.errors import CalibrationError
from cfsp.progress import item_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.text.windows import Windows


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over windows.

    Attributes:
        value: exp of the mean negative log-likelihood.
        tokens: how many tokens were predicted; the first of each window is not.
    """

    value: float
    tokens: int


def perplexity(model: PreTrainedModel, windows: Windows, label: str = "eval") -> Perplexity:
    """Measure perplexity over windows, each on its own, one at a time.

    Log-likelihoods are taken in float32 whatever the model computes in.

    Args:
        model: a causal LM in evaluation mode.
        windows: token windows without padding.
        label: what the progress bar says.

    Raises:
        CalibrationError: token ids exceed the vocabulary, or the loss is NaN.
    """
    check_vocabulary_size(int(model.config.vocab_size), windows.tokens_NT, label)
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode(), item_progress(label, len(windows.tokens_NT), "window") as bar:
        for tokens_T in windows.tokens_NT:
            total += _negative_log_likelihood(model, tokens_T.to(model.device)).cpu()
            bar.update()
    count = windows.tokens_NT.shape[0] * (windows.tokens_NT.shape[1] - 1)
    mean = float(total) / count
    if math.isnan(mean):
        raise CalibrationError(f"{label}: the loss is NaN; evaluate with --dtype float32")
    return Perplexity(math.exp(min(mean, 700.0)), count)


def _negative_log_likelihood(model: PreTrainedModel, tokens_T: Tensor) -> Tensor:
    logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0]
    losses = cross_entropy(logits_TV[:-1].float(), tokens_T[1:], reduction="sum")
    return losses.double()

"""Perplexity of whole models on text.

Windows stand each on their own, or overlap (see `cfsp.text.cutting`): then only tokens that no
earlier window predicted are counted, so that all but the first have much context.

Shapes: N windows, T tokens in a window, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfsp.calibration.calibrate import check_tokens
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
        tokens: how many tokens were predicted; BOS, or the first of each window, is not.
    """

    value: float
    tokens: int


def perplexity(model: PreTrainedModel, windows: Windows, label: str = "eval") -> Perplexity:
    """Measure perplexity over windows, one window at a time.

    Log-likelihoods are taken in float32 whatever the model computes in.

    Args:
        model: a causal LM in evaluation mode.
        windows: token windows without padding; they say which of their tokens are counted.
        label: what the progress bar says.

    Raises:
        CalibrationError: token ids exceed the vocabulary, or the loss is NaN.
    """
    check_tokens(model.config, windows.tokens_NT, label)
    scored_N = windows.scored_N.tolist()
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode(), item_progress(label, len(scored_N), "window") as bar:
        for tokens_T, scored in zip(windows.tokens_NT, scored_N, strict=True):
            total += _negative_log_likelihood(model, tokens_T.to(model.device), scored).cpu()
            bar.update()
    predicted = sum(scored_N)
    mean = float(total) / predicted
    if math.isnan(mean):
        raise CalibrationError(f"{label}: the loss is NaN; evaluate with --dtype float32")
    return Perplexity(math.exp(min(mean, 700.0)), predicted)


def _negative_log_likelihood(model: PreTrainedModel, tokens_T: Tensor, scored: int) -> Tensor:
    output = model(input_ids=tokens_T[None], use_cache=False, logits_to_keep=scored + 1)
    logits_TV = output.logits[0, :-1].float()
    losses = cross_entropy(logits_TV, tokens_T[-scored:], reduction="sum")
    return losses.double()

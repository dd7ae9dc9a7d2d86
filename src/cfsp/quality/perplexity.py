"""Perplexity of whole models on text.

Windows stand each on their own, or overlap: with a stride the same tokens are read as one
stream, each window begins `stride` tokens after the last one, and only tokens that no earlier
window predicted are counted, so that all but the first have much context.

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
from cfsp.errors import CalibrationError, UsageError
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


def perplexity(
    model: PreTrainedModel, windows: Windows, label: str = "eval", stride: int | None = None
) -> Perplexity:
    """Measure perplexity over windows, one window at a time.

    Log-likelihoods are taken in float32 whatever the model computes in.

    Args:
        model: a causal LM in evaluation mode.
        windows: token windows without padding.
        label: what the progress bar says.
        stride: tokens from one window's start to the next one's; None for windows that each
            stand on their own. The windows must then be consecutive text.

    Raises:
        CalibrationError: token ids exceed the vocabulary, or the loss is NaN.
        UsageError: the stride is not in [1, T].
    """
    check_tokens(model.config, windows.tokens_NT, label)
    count, length = windows.tokens_NT.shape
    spans = scored_spans(count, length, stride)
    stream = windows.tokens_NT.reshape(-1)
    total = torch.zeros((), dtype=torch.float64)
    with torch.inference_mode(), item_progress(label, len(spans), "window") as bar:
        for span in spans:
            tokens_T = stream[span.begin : span.end].to(model.device)
            total += _negative_log_likelihood(model, tokens_T, span.scored).cpu()
            bar.update()
    predicted = sum(span.scored for span in spans)
    mean = float(total) / predicted
    if math.isnan(mean):
        raise CalibrationError(f"{label}: the loss is NaN; evaluate with --dtype float32")
    return Perplexity(math.exp(min(mean, 700.0)), predicted)


@dataclass(frozen=True)
class Span:
    """One window as a part of the token stream.

    Attributes:
        begin: first token.
        end: one past the last token.
        scored: how many tokens at the end are predicted and counted.
    """

    begin: int
    end: int
    scored: int


def scored_spans(count: int, length: int, stride: int | None = None) -> list[Span]:
    """Return the windows of a stream of `count` x `length` tokens.

    With a stride shorter than the window, every token but the very first is scored exactly
    once. The last window ends with the stream and so may advance by less than the stride.

    Args:
        count: windows N that the stream would fill without overlap.
        length: tokens T in a window.
        stride: tokens between starts; None for T.

    Raises:
        UsageError: the stride is not in [1, T].
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise UsageError(
            f"--stride must be between 1 and the window's {length} tokens, found {stride}"
        )
    last = (count - 1) * length
    begins = [*range(0, last, stride), last]
    spans: list[Span] = []
    done = 0
    for begin in begins:
        # The first token of a window has no context in it.
        first = max(done, begin + 1)
        spans.append(Span(begin, begin + length, begin + length - first))
        done = begin + length
    return spans


def _negative_log_likelihood(model: PreTrainedModel, tokens_T: Tensor, scored: int) -> Tensor:
    output = model(input_ids=tokens_T[None], use_cache=False, logits_to_keep=scored + 1)
    logits_TV = output.logits[0, :-1].float()
    losses = cross_entropy(logits_TV, tokens_T[-scored:], reduction="sum")
    return losses.double()

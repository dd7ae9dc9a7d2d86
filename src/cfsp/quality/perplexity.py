"""Perplexity: what it is over windows of a text, and that of a model that is held in memory.

Windows stand each on their own, or overlap: with a stride the same tokens are read as one
stream, each window begins `stride` tokens after the last one, and only tokens that no earlier
window predicted are counted, so that all but the first have much context.

Shapes: N windows, T tokens in a window, P predictions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfsp.calibration.calibrate import check_tokens
from cfsp.errors import CalibrationError, UsageError
from cfsp.progress import item_progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp.text.windows import Windows

# Of a float32 log-softmax. Three times faster than without slices: they stay in the cache.
_LOSSES_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over windows, with its conditions: only what has the same ones compares.

    Attributes:
        value: exp of the mean negative log-likelihood.
        tokens: how many tokens were predicted.
        windows: how many windows of text were read, without overlap.
        seqlen: tokens in a window.
        stride: tokens from one window's start to the next one's; None without overlap.
        bos: whether every window begins with BOS.
    """

    value: float
    tokens: int
    windows: int
    seqlen: int
    stride: int | None
    bos: bool

    @property
    def conditions(self) -> dict[str, Any]:
        """Everything but the value, as JSON types."""
        return {name: field for name, field in vars(self).items() if name != "value"}

    def to_json(self) -> dict[str, Any]:
        """Return the rounded value and the conditions."""
        return {"value": round(self.value, 4), **self.conditions}


@dataclass(frozen=True)
class ScoredWindows:
    """Windows as a model reads them, and what is counted of each.

    Attributes:
        tokens_NT: token ids.
        scored_N: how many tokens at the end of each window are predicted and counted.
        windows: how many windows the text fills without overlap.
        stride: see `Perplexity`.
        bos: see `Perplexity`.
    """

    tokens_NT: Tensor
    scored_N: list[int]
    windows: int
    stride: int | None
    bos: bool

    def perplexity(self, loss: float, label: str) -> Perplexity:
        """Return the perplexity that a sum of losses amounts to.

        Raises:
            CalibrationError: it is NaN.
        """
        if math.isnan(loss):
            raise CalibrationError(f"{label}: the loss is NaN; evaluate with --dtype float32")
        tokens = sum(self.scored_N)
        value = math.exp(min(loss / tokens, 700.0))
        length = self.tokens_NT.shape[1]
        return Perplexity(value, tokens, self.windows, length, self.stride, self.bos)


def scored_windows(windows: Windows, stride: int | None = None) -> ScoredWindows:
    """Return what a model reads of some windows.

    With a stride shorter than the window, every token but the very first is scored exactly
    once. The last window ends with the stream and so may advance by less than the stride.

    Args:
        windows: token windows without padding; consecutive text if there is a stride.
        stride: tokens from one window's start to the next one's; None for windows that each
            stand on their own.

    Raises:
        UsageError: the stride is not in [1, T].
    """
    count, length = windows.tokens_NT.shape
    if stride is None:
        # The first token of a window has no context in it.
        return ScoredWindows(windows.tokens_NT, [length - 1] * count, count, None, bos=False)
    if not 1 <= stride <= length:
        raise UsageError(
            f"--stride must be between 1 and the window's {length} tokens, found {stride}"
        )
    stream = windows.tokens_NT.reshape(-1)
    last = (count - 1) * length
    begins = [*range(0, last, stride), last]
    scored_N: list[int] = []
    done = 0
    for begin in begins:
        scored_N.append(begin + length - max(done, begin + 1))
        done = begin + length
    tokens_NT = torch.stack([stream[begin : begin + length] for begin in begins])
    return ScoredWindows(tokens_NT, scored_N, count, stride, bos=False)


def negative_log_likelihood(logits_PV: Tensor, next_P: Tensor) -> float:
    """Return the sum of -log p(next token) in nats, computed in float32, a few rows at a time."""
    rows = max(1, _LOSSES_AT_ONCE // logits_PV.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=logits_PV.device)
    for logits_RV, next_R in zip(
        torch.split(logits_PV, rows), torch.split(next_P, rows), strict=True
    ):
        total += cross_entropy(logits_RV.float(), next_R, reduction="sum")
    return float(total)


def perplexity(model: PreTrainedModel, windows: Windows, label: str = "eval") -> Perplexity:
    """Measure the perplexity of a model in memory, one window at a time.

    For what holds the whole model anyway; `streamed_perplexity` gives the same for any model.

    Args:
        model: a causal LM in evaluation mode.
        windows: token windows without padding.
        label: what the progress bar says.

    Raises:
        CalibrationError: token ids exceed the vocabulary, or the loss is NaN.
    """
    check_tokens(model.config, windows.tokens_NT, label)
    scored = scored_windows(windows)
    loss = 0.0
    with torch.inference_mode(), item_progress(label, len(scored.scored_N), "window") as bar:
        for tokens_T, count in zip(scored.tokens_NT, scored.scored_N, strict=True):
            tokens_T = tokens_T.to(model.device)
            output = model(input_ids=tokens_T[None], use_cache=False, logits_to_keep=count + 1)
            loss += negative_log_likelihood(output.logits[0, :-1], tokens_T[-count:])
            bar.update()
    return scored.perplexity(loss, label)

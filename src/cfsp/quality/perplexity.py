"""Perplexity: what it is over windows of a text, and that of a model that is held in memory.

Windows stand each on their own, or overlap; the windows say how many tokens at the end of each are
counted (see `cfsp.text.windows`).

Shapes: N windows, T tokens in a window, P predictions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cfsp.calibration.calibrate import check_tokens
from cfsp.errors import CalibrationError
from cfsp.progress import item_progress
from cfsp.streaming.decoder_end import text_model

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
        windows: how many windows of text were read.
        seqlen: tokens in a window.
        bos: whether every window begins with BOS.
        evaluation_part: whether the text has a part that nothing is calibrated or trained on, and
            they are of it.
    """

    value: float
    tokens: int
    windows: int
    seqlen: int
    bos: bool
    evaluation_part: bool = False

    @property
    def conditions(self) -> dict[str, Any]:
        """Everything but the value, as JSON types."""
        return {name: field for name, field in vars(self).items() if name != "value"}

    def to_json(self) -> dict[str, Any]:
        """Return the rounded value and the conditions."""
        return {"value": round(self.value, 4), **self.conditions}


def perplexity_of(loss: float, windows: Windows, label: str) -> Perplexity:
    """Return the perplexity that a sum of losses over windows amounts to.

    Args:
        loss: nats, over all counted tokens of the windows.
        windows: read.
        label: what an error calls the measurement.

    Raises:
        CalibrationError: it is NaN.
    """
    if math.isnan(loss):
        raise CalibrationError(f"{label}: the loss is NaN; evaluate with --dtype float32")
    tokens = int(windows.scored_N.sum())
    return Perplexity(
        math.exp(min(loss / tokens, 700.0)),
        tokens,
        sum(windows.sources.values()) or len(windows.tokens_NT),
        windows.tokens_NT.shape[1],
        windows.bos,
        windows.evaluation_part,
    )


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
    scored_N = windows.scored_N.tolist()
    predictor = text_model(model)
    loss = 0.0
    with torch.inference_mode(), item_progress(label, len(scored_N), "window") as bar:
        for tokens_T, count in zip(windows.tokens_NT, scored_N, strict=True):
            tokens_T = tokens_T.to(model.device)
            output = predictor(input_ids=tokens_T[None], use_cache=False, logits_to_keep=count + 1)
            loss += negative_log_likelihood(output.logits[0, :-1], tokens_T[-count:])
            bar.update()
    return perplexity_of(loss, windows, label)


def before_and_after(
    before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return text -> {"before", "after"} and the conditions of the latter, of perplexities as JSON.

    Of the latter: a sweep compares them with the dense model's, which may be older.
    """
    table: dict[str, dict[str, Any]] = {}
    for text, found in before.items():
        conditions = {name: value for name, value in after[text].items() if name != "value"}
        table[text] = {"before": found["value"], "after": after[text]["value"], **conditions}
    return table

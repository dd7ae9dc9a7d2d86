"""Agreement with the dense model: how far predictions are from its own, position by position.

The dense model's last hidden states wait, in memory or in a file, while other models stream; the
two heads are applied to some positions at a time. Two models are never in memory as a whole.

Shapes: P positions of a window, R some of them, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cfsp.quality.paired import difference, geometric_mean, per_count
from cfsp.streaming.decoder_end import Head
from cfsp.streaming.hidden_states import HiddenStates

# Of two float32 log-softmaxes; small enough to stay in the cache.
_PROBABILITIES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class DenseEnd:
    """What the dense model predicts on the windows of a text."""

    head: Head
    hidden: HiddenStates  # what leaves its last block, of all windows
    device: torch.device  # of the head

    def hidden_of(self, window: int) -> Tensor:
        """Return the hidden states of one window, TD."""
        batch = slice(window, window + 1)
        hidden_TD = self.hidden.read(batch)[0].clone().to(self.device)
        self.hidden.forget(batch)
        return hidden_TD


def divergence_and_agreement(logits_PV: Tensor, dense_PV: Tensor) -> tuple[float, int]:
    """Compare the predictions of a model with the dense model's, in float32.

    Returns the sum of KL(dense || model) over the positions in nats, and at how many of them the
    most likely token is the dense model's (top-1 agreement).
    """
    rows = max(1, _PROBABILITIES_AT_ONCE // logits_PV.shape[1])
    divergence = torch.zeros((), dtype=torch.float64, device=logits_PV.device)
    agreed = torch.zeros((), dtype=torch.int64, device=logits_PV.device)
    for logits_RV, dense_RV in zip(
        torch.split(logits_PV, rows), torch.split(dense_PV, rows), strict=True
    ):
        log_dense_RV = dense_RV.float().log_softmax(-1)
        probability_RV = log_dense_RV.exp()
        difference_RV = log_dense_RV - logits_RV.float().log_softmax(-1)
        # A token that the dense model rules out counts nothing, also if both rule it out.
        difference_RV.masked_fill_(probability_RV == 0, 0)
        divergence += torch.linalg.vecdot(probability_RV, difference_RV).sum(dtype=torch.float64)
        agreed += (logits_RV.argmax(-1) == dense_RV.argmax(-1)).sum()
    return float(divergence), int(agreed)


def agreement_of(dense: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return how far a model is from the dense one, by text and in sum."""
    by_text: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for text, sums in model["windows"].items():
        counts = sums["predicted"]
        rise = per_count(difference(dense["windows"][text]["loss"], sums["loss"]), counts)
        ratios[text] = math.exp(min(rise.value, 700.0))
        by_text[text] = {
            "perplexity_ratio": round(ratios[text], 6),
            "loss_rise": rise.to_json(),
            "divergence": per_count(sums["divergence"], counts).to_json(),
            "agreed": per_count(sums["agreed"], counts).to_json(),
        }
    found: dict[str, Any] = {
        "against": dense["model"],
        "fingerprint": dense["fingerprint"],
        "texts": by_text,
    }
    if ratios:
        worst = max(ratios, key=lambda text: ratios[text])
        found |= {
            "perplexity_ratio": round(geometric_mean(list(ratios.values())), 6),
            "worst": {"text": worst, "perplexity_ratio": round(ratios[worst], 6)},
        }
    return found

"""Text that the model writes itself: from its own distribution, the same for the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cfsp.errors import CalibrationError, TextError
from cfsp.whole_model.own_text import first_token, own_windows
from tiny_models import TINY_CONFIGS, VOCABULARY, build_tiny_model


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_every_family_writes(name: str) -> None:
    model = build_tiny_model(name)
    tokens_NT = own_windows(model, 0, count=2, seqlen=6, seed=0)
    assert tokens_NT.shape == (2, 6)
    assert tokens_NT.dtype == torch.int64
    assert int(tokens_NT.min()) >= 0 and int(tokens_NT.max()) < VOCABULARY


def test_a_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = build_tiny_model("llama")
    first = own_windows(model, 0, count=18, seqlen=5, seed=3)
    state = torch.random.get_rng_state()
    assert torch.equal(first, own_windows(model, 0, count=18, seqlen=5, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(first, own_windows(model, 0, count=18, seqlen=5, seed=4))
    assert len(first.unique(dim=0)) == 18


def test_text_follows_the_models_distribution() -> None:
    model = build_tiny_model("llama")
    with torch.inference_mode():
        model.lm_head.weight.mul_(4)  # peaked, so that few samples show it
        probability_V = model(torch.tensor([[7]])).logits[0, -1].softmax(-1)
    drawn = own_windows(model, 7, count=600, seqlen=2, seed=0)[:, 0]
    frequency_V = torch.bincount(drawn, minlength=VOCABULARY) / 600
    assert float((frequency_V - probability_V).abs().max()) < 0.08
    # The second token is drawn after the first one, with what the cache knows.
    most = int(frequency_V.argmax())
    with torch.inference_mode():
        after_V = model(torch.tensor([[7, most]])).logits[0, -1].softmax(-1)
    pairs = own_windows(model, 7, count=600, seqlen=2, seed=1)
    second = pairs[pairs[:, 0] == most, 1]
    seen_V = torch.bincount(second, minlength=VOCABULARY) / len(second)
    assert float((seen_V - after_V).abs().max()) < 0.35


def test_a_model_that_predicts_nan_is_refused() -> None:
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="predicts NaN"):
        own_windows(model, 0, count=1, seqlen=2, seed=0)


class Tokens:
    def __init__(self, bos: int | None, eos: int | None) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos


def test_a_text_begins_after_bos_or_eos() -> None:
    model: Any = build_tiny_model("llama")
    assert first_token(model, Tokens(5, 6)) == 5  # type: ignore[arg-type]
    assert first_token(model, Tokens(None, 6)) == model.config.bos_token_id  # type: ignore[arg-type]
    model.config.bos_token_id = None
    assert first_token(model, Tokens(None, 6)) == 6  # type: ignore[arg-type]
    with pytest.raises(TextError, match=r"--data self.*no token"):
        first_token(model, Tokens(None, None))  # type: ignore[arg-type]

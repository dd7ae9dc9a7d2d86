"""Masking: a masked model is the pruned one, and afterwards the dense one again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import LoadedModel
from cfsp.cut.in_memory import build_pruned_model
from cfsp.planning.plan_file import ModelIdentity, PruningPlan, UnitPlan
from cfsp.quality.perplexity import perplexity
from cfsp.selection.masks import masked_channels, masked_loss
from cfsp.text.windows import Windows
from tiny_models import TINY_CONFIGS, VOCABULARY, build_tiny_model

KEPT = ((0, 5, 7, 95), tuple(range(96)), tuple(range(1, 96, 2)))


def windows_of(seed: int = 0) -> Windows:
    generator = torch.Generator().manual_seed(seed)
    return Windows(torch.randint(VOCABULARY, (3, 12), generator=generator), {"random": 3})


def plan_for(model: Any) -> PruningPlan:
    """The first block keeps a few channels, the second all, the third every other.

    Experts keep others each: the first as many from the next channel on, and so on.
    """
    source = LoadedModel(model)
    units = tuple(
        UnitPlan(unit.block, unit.width, kept_of_all(unit), 0.1, 0.5, unit.ffns)
        for unit in source.units
    )
    return PruningPlan(ModelIdentity.of(source), {}, {"windows": 1, "seqlen": 2}, units)


def kept_of_all(unit: Unit) -> tuple[int, ...]:
    own = [channel for channel in KEPT[unit.block] if channel < unit.width]
    return tuple(
        ffn * unit.width + channel
        for ffn in range(unit.ffns)
        for channel in sorted((channel + ffn) % unit.width for channel in own)
    )


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_the_masked_loss_is_that_of_the_pruned_model(name: str) -> None:
    model, windows = build_tiny_model(name), windows_of()
    plan = plan_for(model)
    dense = math.log(perplexity(model, windows).value)
    pruned = build_pruned_model(model, LoadedModel(model), plan, {})
    expected = math.log(perplexity(pruned, windows).value)
    assert masked_loss(LoadedModel(model), model, plan, windows) == pytest.approx(
        expected, abs=1e-5
    )
    assert expected != pytest.approx(dense, abs=1e-4)
    assert math.log(perplexity(model, windows).value) == dense


def test_blocks_that_are_not_named_stay_dense() -> None:
    model, tokens_BT = build_tiny_model("llama"), windows_of().tokens_NT
    with torch.inference_mode():
        dense_BTV = model(tokens_BT).logits
        with masked_channels(LoadedModel(model), model, {}):
            assert torch.equal(model(tokens_BT).logits, dense_BTV)
        with masked_channels(LoadedModel(model), model, {1: tuple(range(96))}):
            assert torch.equal(model(tokens_BT).logits, dense_BTV)
        with masked_channels(LoadedModel(model), model, {1: (3, 4)}):
            one_BTV = model(tokens_BT).logits
    weight_DF = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight_DF[:, torch.arange(96) < 3] = 0
        weight_DF[:, torch.arange(96) > 4] = 0
        torch.testing.assert_close(model(tokens_BT).logits, one_BTV)


def test_an_error_leaves_the_model_dense() -> None:
    model, tokens_BT = build_tiny_model("llama"), windows_of().tokens_NT
    with torch.inference_mode():
        dense_BTV = model(tokens_BT).logits
        with (
            pytest.raises(KeyboardInterrupt),
            masked_channels(LoadedModel(model), model, {0: (1,)}),
        ):
            raise KeyboardInterrupt
        assert torch.equal(model(tokens_BT).logits, dense_BTV)

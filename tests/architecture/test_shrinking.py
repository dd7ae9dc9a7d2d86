from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    GPT2Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.shrinking import smaller_configs


def on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return model_class_of(config)._from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(), GPT2Config(), DeepseekV3Config(), GraniteMoeHybridConfig(), Gemma3Config(),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_the_small_model_has_the_same_units(config: PreTrainedConfig) -> None:
    before = config.to_dict()
    smallest = next(smaller_configs(config))
    assert config.to_dict() == before
    small, large = on_meta(smallest), on_meta(config)
    found, expected = find_architecture(small), find_architecture(large)
    assert [(u.block, u.form, u.ffns) for u in found.units] == [
        (u.block, u.form, u.ffns) for u in expected.units
    ]
    assert all(
        mine.width < other.width / 4
        for mine, other in zip(found.units, expected.units, strict=True)
    )
    decoder = large.get_submodule(expected.decoder)
    few = sum(p.numel() for p in small.get_submodule(found.decoder).parameters())
    assert few < sum(p.numel() for p in decoder.parameters()) / 50


def test_the_last_one_has_the_widths_of_the_config() -> None:
    config = LlamaConfig()
    *_, last = smaller_configs(config)
    assert last.vocab_size == 512
    assert (last.hidden_size, last.intermediate_size) == (4096, 11008)


def test_special_tokens_stay_in_the_vocabulary() -> None:
    config = LlamaConfig(pad_token_id=31999, eos_token_id=[2, 30000])
    for smaller in smaller_configs(config):
        assert smaller.pad_token_id < smaller.vocab_size
        assert max(smaller.eos_token_id) < smaller.vocab_size


def test_small_models_stay_as_they_are() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=96, vocab_size=128)
    [only] = smaller_configs(config)
    assert only.to_dict() == config.to_dict()

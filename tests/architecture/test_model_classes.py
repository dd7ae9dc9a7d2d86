from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BartConfig,
    BertConfig,
    CLIPConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3_5Config,
)

from cfsp.architecture.model_classes import model_class_of
from cfsp.errors import UnsupportedModelError
from toy_decoders import ToyConfig, register


@pytest.mark.parametrize(
    ("config", "architectures", "expected"),
    [
        (LlamaConfig(), None, "LlamaForCausalLM"),
        (LlamaConfig(), ["PrunedLlamaForCausalLM"], "LlamaForCausalLM"),
        (LlamaConfig(), ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
        (LlamaConfig(), ["NoSuchClass"], "LlamaForCausalLM"),
        (Gemma3TextConfig(), None, "Gemma3ForCausalLM"),
        (Gemma3Config(), None, "Gemma3ForConditionalGeneration"),
        (Gemma3Config(), ["Gemma3ForConditionalGeneration"], "Gemma3ForConditionalGeneration"),
        (Qwen3_5Config(), None, "Qwen3_5ForConditionalGeneration"),
    ],
)
def test_the_class_of_a_config(config: PreTrainedConfig, architectures: Any, expected: str) -> None:
    config.architectures = architectures
    assert model_class_of(config).__name__ == expected


@pytest.mark.parametrize("architectures", [None, ["ToyForCausalLM"], ["PrunedToyForCausalLM"]])
def test_a_class_that_the_user_registered(architectures: Any) -> None:
    register()
    assert model_class_of(ToyConfig(architectures=architectures)).__name__ == "ToyForCausalLM"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BartConfig(), "is an encoder with a decoder"),
        (BertConfig(), "is an encoder"),
        (CLIPConfig(), "has no class for causal language modelling"),
    ],
)
def test_what_is_no_decoder_is_refused(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        model_class_of(config)

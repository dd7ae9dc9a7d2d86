from __future__ import annotations

import pytest
import torch
from transformers import (
    GemmaConfig,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from cfsp.architecture.found import Architecture
from cfsp.architecture.proof import prove
from cfsp.errors import CheckpointError, UnsupportedModelError
from toy_decoders import BLOCKS, CHANNELS, ToyConfig, register


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def test_a_class_that_transformers_does_not_know_is_proved() -> None:
    found = prove(ToyConfig())
    assert found.class_name == "ToyForCausalLM"
    assert (found.decoder, found.blocks, found.block_count) == ("core", "core.steps", BLOCKS)
    assert [unit.block for unit in found.units] == [0, 2, 3]
    for unit in found.units:
        assert (unit.path, unit.width, unit.ffns, unit.routed) == ("thinker", CHANNELS, 1, False)
        assert unit.is_fused
        assert unit.axes["thinker.squeeze.weight"].fusion == "interleaved"
        assert unit.axes["thinker.squeeze.bias"].fusion == "interleaved"
        assert unit.axes["thinker.unsqueeze.weight"].fusion is None
    assert found.refused == ()


@pytest.mark.parametrize(
    ("trick", "module", "check"),
    [
        ("width feeds attention", "core.steps.0.thinker", "cut"),
        ("softmax over channels", "core.steps.0.thinker", "cut"),
        ("channels rolled", "core.steps.0.thinker", "cut"),
        # The largest channel is kept in one half of them.
        *((f"quantised by the largest {n}", "core.steps.0.thinker", "cut") for n in range(4)),
        ("output not used", "core.steps.0.thinker", "bites"),
        ("a neighbour looks", "core.steps.0.thinker", "neighbours"),
        ("a block called twice", "core.steps.2", "order"),
        ("something between blocks", "core.steps.3", "order"),
    ],
)
def test_what_only_looks_like_an_ffn_is_refused(trick: str, module: str, check: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        prove(ToyConfig(trick=trick))
    message = str(caught.value)
    assert f"{module} failed the check {check}: expected" in message
    assert "found" in message
    assert "please report" in message


@pytest.mark.parametrize("trick", ["weights tied between blocks", "one module in two blocks"])
def test_weights_of_two_blocks_are_left_alone(trick: str) -> None:
    found = prove(ToyConfig(trick=trick))
    assert [unit.block for unit in found.units] == [0]
    assert [refusal.module for refusal in found.refused] == [
        "core.steps.2.thinker",
        "core.steps.3.thinker",
    ]
    for refusal in found.refused:
        assert refusal.reason.startswith("alone: expected weights that are used nowhere else")


def units(found: Architecture) -> set[tuple[str, int, int, str | None]]:
    return {(u.path, u.width, u.ffns, u.axes[u.up].fusion) for u in found.units}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), {("mlp", 11008, 1, None)}),
        (LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3,
                     intermediate_size=1536), {("mlp", 1536, 1, None)}),
        (LlamaConfig(mlp_bias=True, num_hidden_layers=1), {("mlp", 11008, 1, None)}),
        (GemmaConfig(), {("mlp", 24576, 1, None)}),
        (OPTConfig(), {("", 3072, 1, None)}),
        (GptOssConfig(), {("mlp.experts", 2880, 128, "interleaved")}),
        (Qwen2MoeConfig(mlp_only_layers=[0]), {
            ("mlp", 5632, 1, None), ("mlp.experts", 1408, 60, "halves"),
            ("mlp.shared_expert", 5632, 1, None)}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_units_have_the_widths_of_the_real_config(
    config: PreTrainedConfig, expected: set[tuple[str, int, int, str | None]]
) -> None:
    before = config.to_dict()
    found = prove(config)
    assert units(found) == expected
    assert found.refused == ()
    assert {**config.to_dict(), "dtype": None} == {**before, "dtype": None}


def test_proving_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    prove(ToyConfig())
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_that_no_model_can_have_are_a_fault_of_the_config() -> None:
    with pytest.raises(CheckpointError, match="no llama model can be built from"):
        prove(
            LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters={"rope_type": "x"})
        )

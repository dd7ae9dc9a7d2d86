"""What a .gguf file says of attention and sizes, as a config."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import (
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    NemotronConfig,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3Config,
    StableLmConfig,
)

from cfsp.checkpoint.gguf_rope import query_scalar, restore_numbers, restore_positions
from ragged import LINEAR
from tiny_decoders import tiny_config


def reader_of(graph: str, said: dict[str, object], **tensors: list[float]) -> SimpleNamespace:
    """Return a reader of a file that says this and holds these tensors."""
    said = {"general.architecture": graph} | {f"{graph}.{key}": said[key] for key in said}
    return SimpleNamespace(
        fields={key: SimpleNamespace(contents=partial(said.get, key)) for key in said},
        tensors=[
            SimpleNamespace(name=f"{name}.weight", data=np.array(data, np.float32))
            for name, data in tensors.items()
        ],
    )


@pytest.mark.parametrize(
    ("graph", "blocks", "scalar"),
    [("gemma2", 46, 144), ("gemma2", 42, 128), ("gemma3", 62, 144), ("gemma3", 46, 128)],
)
def test_the_largest_gemmas_scale_queries_by_the_hidden_size(graph, blocks, scalar):
    config = Gemma2Config(
        num_hidden_layers=blocks, hidden_size=4608, num_attention_heads=32, head_dim=128
    )
    assert query_scalar(graph, config) == scalar


# Of a file: a part of the head is rotated; the factor of attention is the config's own.
EPSILON = {"attention.layer_norm_epsilon": 0.01}
ROTATED = {"rope.dimension_count": 96}
OF_YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64, "rope.scaling.yarn_attn_factor": 1.5,
    "rope.scaling.yarn_beta_fast": 16.0,
}  # fmt: skip

NONE = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("config_class", "graph", "said", "expected"),
    [
        (Qwen3Config, "qwen3", {"attention.key_length": 64}, {"head_dim": 64}),
        (Phi3Config, "phi3", {"attention.sliding_window": 2047}, {"sliding_window": 2047}),
        (Phi3Config, "phi3", {"attention.sliding_window": 0}, {"sliding_window": None}),
        (
            Qwen2MoeConfig,
            "qwen2moe",
            {"expert_feed_forward_length": 7, "expert_shared_feed_forward_length": 9},
            {"moe_intermediate_size": 7, "shared_expert_intermediate_size": 9},
        ),
        (GPT2Config, "gpt2", {"context_length": 256}, {"n_positions": 256}),
        (FalconConfig, "falcon", EPSILON, {"layer_norm_epsilon": 0.01}),
        (NemotronConfig, "nemotron", EPSILON, {"norm_eps": 0.01}),
        # Some configs say the size of a head, others that of all heads together.
        (StableLmConfig, "any", ROTATED, {"partial_rotary_factor": 0.75}),
        (NemotronConfig, "any", ROTATED, {"partial_rotary_factor": 0.75}),
        (Qwen3Config, "qwen3", OF_YARN, {"attention_factor": 1.5, "beta_fast": 16.0}),
        (Qwen3Config, "qwen3", OF_YARN, {"original_max_position_embeddings": 64}),
        # Without it the context is the original one, as in llama.cpp.
        (
            Qwen3Config,
            "qwen3",
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"original_max_position_embeddings": 32768, "factor": 4.0},
        ),
        # A factor of no type is linear.
        (Qwen3Config, "qwen3", {"rope.scaling.factor": 4.0}, LINEAR),
        (Qwen3Config, "qwen3", {"rope.scale_linear": 4.0}, LINEAR),
        (Qwen3Config, "qwen3", NONE, {"rope_type": "default"}),
    ],
)
def test_sizes_and_positions_come_from_the_file(config_class, graph, said, expected):
    """transformers leaves these at the default of the class, which is one model's."""
    config = config_class(hidden_size=512, num_attention_heads=4)
    restore_numbers(config, reader_of(graph, said))
    restore_positions(config, reader_of(graph, said))
    found = vars(config) | getattr(config, "rope_parameters", {})
    assert {name: found[name] for name in expected} == expected


def test_ollamas_files_of_gemma3_are_refused_and_others_read():
    """Its runtime knows what they do not say."""
    config, said = Gemma3TextConfig(), {"final_logit_softcapping": 30.0}
    with pytest.raises(ValueError, match="says no base of its positions, as Ollama"):
        restore_positions(config, reader_of("gemma3", said))
    said["rope.freq_base"] = 1e6
    restore_numbers(config, reader_of("gemma3", said))
    restore_positions(config, reader_of("gemma3", said))
    assert config.final_logit_softcapping == 30.0
    assert config.rope_parameters == {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }


@pytest.mark.parametrize("more", [{}, {"rope.scaling.type": "longrope"}])
def test_factors_for_long_and_for_short_texts_are_read(more):
    """Phi 3's converter names no way to scale; the tensors tell."""
    said = {
        "rope.freq_base": 10_000.0, "rope.dimension_count": 6,
        "rope.scaling.original_context_length": 4096, "rope.scaling.attn_factor": 1.25, **more,
    }  # fmt: skip
    factors = {"rope_factors_long": [1.0, 2.0, 4.0], "rope_factors_short": [1.0, 1.5, 2.0]}
    config = Phi3Config(hidden_size=32, num_attention_heads=4)
    restore_positions(config, reader_of("phi3", said, **factors))
    assert config.rope_parameters == {
        "rope_type": "longrope", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75,
        "long_factor": [1.0, 2.0, 4.0], "short_factor": [1.0, 1.5, 2.0],
        "attention_factor": 1.25, "original_max_position_embeddings": 4096,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [{}, {"rope.scaling.type": "linear"}, NONE])
def test_attention_is_scaled_with_yarn_and_longrope_alone(kind):
    """llama.cpp multiplies by it whatever the type; no config of another can say so."""
    said = {"rope.scaling.attn_factor": 1.0, **kind}
    restore_positions(Qwen3Config(), reader_of("qwen3", said))
    with pytest.raises(ValueError, match="attention is scaled, which a config can say of YaRN"):
        restore_positions(
            Qwen3Config(), reader_of("qwen3", said | {"rope.scaling.attn_factor": 1.3})
        )


PATTERN = "attention.sliding_window_pattern"


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        # As llama.cpp reads it: True has a window, and n is that each nth block has none.
        ([True, False, False, True, True, True], "S--SSS"),
        ([1, 0, 0, 1, 1, 1], "S--SSS"),
        (3, "SS-SS-"),
        (7, "SSSSSS"),
        (1, "------"),
        (0, "SSSSSS"),
    ],
)
@pytest.mark.parametrize("config_class", [Gemma2Config, Gemma3TextConfig])
def test_which_blocks_have_a_window_is_read(config_class, pattern, windows):
    config = config_class(num_hidden_layers=6)
    restore_numbers(config, reader_of("any", {PATTERN: pattern}))
    assert "".join("S" if "sliding" in kind else "-" for kind in config.layer_types) == windows


@pytest.mark.parametrize("pattern", [[True, False], ["a"] * 6, True, -1, 3.0, "3"])
def test_a_pattern_that_says_it_of_other_blocks_is_refused(pattern):
    with pytest.raises(ValueError, match="pattern is no number and not one of 6 blocks"):
        restore_numbers(Gemma2Config(num_hidden_layers=6), reader_of("gemma2", {PATTERN: pattern}))


def test_a_pattern_of_a_model_without_windows_changes_nothing():
    config = Qwen3Config(num_hidden_layers=2)
    restore_numbers(config, reader_of("qwen3", {PATTERN: 2}))
    assert set(config.layer_types) == {"full_attention"}


def test_a_pattern_that_would_move_blocks_of_two_sizes_is_refused():
    config = tiny_config("gemma4_text")
    said = [kind == "sliding_attention" for kind in config.layer_types]
    restore_numbers(config, reader_of("gemma4", {PATTERN: said}))
    with pytest.raises(ValueError, match="other blocks have a window than in the model's class"):
        restore_numbers(config, reader_of("gemma4", {PATTERN: 0}))

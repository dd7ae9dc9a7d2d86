"""Proof: the class of a config, a small model of it, what is found in it, and its resizing."""

import inspect
import re

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from cfsp.architecture import resizing
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.found import HALVES, INTERLEAVED, Architecture
from cfsp.architecture.model_classes import model_class_of
from cfsp.architecture.proof import prove, small_run_of
from cfsp.architecture.resizing import resize_ffn
from cfsp.architecture.smaller_config import smaller_configs
from cfsp.errors import UnsupportedModelError
from tiny_models import TINY_CONFIGS
from toy_decoders import BLOCKS, CHANNELS, InterleavedFFN, ToyConfig, register

# The config of a type with all its defaults, or with others.
config_of = AutoConfig.for_model


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def test_a_class_that_transformers_does_not_know_is_proved():
    found = prove(ToyConfig())
    assert found.class_name == "ToyForCausalLM"
    assert (found.decoder, found.blocks, found.block_count) == ("core", "core.steps", BLOCKS)
    assert [unit.block for unit in found.units] == [0, 2, 3]
    for unit in found.units:
        assert (unit.path, unit.width, unit.ffns, unit.routed) == ("thinker", CHANNELS, 1, False)
        assert unit.axes["thinker.squeeze.weight"].spans == INTERLEAVED
        assert unit.axes["thinker.squeeze.bias"].spans == INTERLEAVED
        assert unit.axes["thinker.unsqueeze.weight"].spans == (1,)
    assert found.refused == ()


@pytest.mark.parametrize(
    ("trick", "module", "check"),
    [
        ("width feeds attention", "core.steps.0.thinker", "cut"),
        ("softmax over channels", "core.steps.0.thinker", "cut"),
        ("channels rolled", "core.steps.0.thinker", "cut"),
        # The largest channel is kept in one half of them.
        *((f"quantised by the largest {n}", "core.steps.0.thinker", "cut") for n in range(4)),
        ("more rows than tokens", "core.steps.0.thinker", "watched"),
        ("output not used", "core.steps.0.thinker", "bites"),
        ("a neighbour looks", "core.steps.0.thinker", "neighbours"),
        ("a block called twice", "core.steps.2", "order"),
        ("a block skipped", "core.steps.2", "order"),
        ("something between blocks", "core.steps.3", "order"),
        ("windows and tokens are one axis", "core.steps.0", "order"),
    ],
)
def test_what_only_looks_like_an_ffn_is_refused(trick, module, check):
    with pytest.raises(UnsupportedModelError) as caught:
        prove(ToyConfig(trick=trick))
    message = str(caught.value)
    assert f"{module} failed the check {check}: expected" in message
    assert "found" in message
    assert message.count("please report") == 1


def test_near_ties_are_not_turned_by_rounding():
    """The order in which a kernel adds would decide whether the model is taken."""
    found = prove(ToyConfig(trick="choices that float32 would round", channels=1024))
    assert [unit.block for unit in found.units] == [0, 2, 3]


class Dtypes(TorchFunctionMode):
    """Collects what is computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.seen.add(result.dtype)
        return result


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
def test_what_a_class_asks_for_in_float32_is_float64(name):
    run = small_run_of(TINY_CONFIGS[name]())
    with Dtypes() as dtypes, torch.no_grad():
        run.decoder_output()
        run.output(1)
    assert dtypes.seen == {torch.float64}


def test_one_thread_proves(noted):
    """Several wait for each other where other programs run."""
    threads = noted(InterleavedFFN, "forward", lambda *_: torch.get_num_threads())
    torch.set_num_threads(2)
    try:
        prove(ToyConfig())
        assert set(threads) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_what_loses_kv_groups_has_ffns_that_can_be_cut(monkeypatch):
    """Blocks are known by their FFNs, so that it is refused when it is opened, not later."""
    monkeypatch.setitem(ACT2FN, "softmax", (nn.Softmax, {"dim": -1}))
    config = TINY_CONFIGS["llama"]()
    config.hidden_act = "softmax"
    with pytest.raises(UnsupportedModelError, match="no FFN of LlamaForCausalLM can be cut"):
        prove(config, parts=("kv",))


def test_one_channel_cannot_be_cut():
    config = TINY_CONFIGS["llama"]()
    config.intermediate_size = 1
    with pytest.raises(UnsupportedModelError, match="no FFN of LlamaForCausalLM can be cut"):
        prove(config)


def test_a_decoder_that_takes_no_token_ids_is_refused():
    with pytest.raises(UnsupportedModelError, match="could not be tried on random weights"):
        prove(ToyConfig(trick="takes no token ids"))


@pytest.mark.parametrize("trick", ["weights tied between blocks", "one module in two blocks"])
def test_weights_of_two_blocks_are_left_alone(trick):
    found = prove(ToyConfig(trick=trick))
    assert [unit.block for unit in found.units] == [0]
    assert [each.module for each in found.refused] == [f"core.steps.{n}.thinker" for n in (2, 3)]
    for refusal in found.refused:
        assert refusal.reason.startswith("alone: expected weights that are used nowhere else")


def units(found: Architecture) -> set[tuple[str, int, int, tuple[int, ...]]]:
    return {(u.path, u.width, u.ffns, u.axes[u.up].spans) for u in found.units}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), {("mlp", 11008, 1, (1,))}),
        (LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3,
                     intermediate_size=1536), {("mlp", 1536, 1, (1,))}),
        (LlamaConfig(mlp_bias=True, num_hidden_layers=1), {("mlp", 11008, 1, (1,))}),
        (config_of("gemma"), {("mlp", 24576, 1, (1,))}),
        (config_of("opt"), {("", 3072, 1, (1,))}),
        (config_of("gpt_oss", num_hidden_layers=4), {("mlp.experts", 2880, 128, INTERLEAVED)}),
        (config_of("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[0]), {
            ("mlp", 5632, 1, (1,)), ("mlp.experts", 1408, 60, HALVES),
            ("mlp.shared_expert", 5632, 1, (1,))}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_units_have_the_widths_of_the_real_config(config, expected):
    before = config.to_dict()
    found = prove(config)
    assert units(found) == expected
    assert found.refused == ()
    assert {**config.to_dict(), "dtype": None} == {**before, "dtype": None}


def test_proving_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    prove(ToyConfig())
    assert torch.equal(torch.get_rng_state(), state)


# The class of a config.

TOY_NAMES = (None, ["ToyForCausalLM"], ["PrunedToyForCausalLM"])
GEMMA3 = "Gemma3ForConditionalGeneration"


@pytest.mark.parametrize(
    ("config", "architectures", "expected"),
    [
        (LlamaConfig(), None, "LlamaForCausalLM"),
        (LlamaConfig(), ["PrunedLlamaForCausalLM"], "LlamaForCausalLM"),
        (LlamaConfig(), ["LlamaForSequenceClassification"], "LlamaForCausalLM"),
        (LlamaConfig(), ["NoSuchClass"], "LlamaForCausalLM"),
        (config_of("gemma3_text"), None, "Gemma3ForCausalLM"),
        (config_of("gemma3"), None, GEMMA3),
        (config_of("gemma3"), [GEMMA3], GEMMA3),
        (config_of("qwen3_5"), None, "Qwen3_5ForConditionalGeneration"),
        # A class that the user registered.
        *((ToyConfig(), name, "ToyForCausalLM") for name in TOY_NAMES),
    ],
)
def test_the_class_of_a_config(config, architectures, expected):
    config.architectures = architectures
    assert model_class_of(config).__name__ == expected


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of("bart"), "is an encoder with a decoder"),
        (config_of("bert"), "is an encoder"),
        (config_of("clip"), "has no class for causal language modelling"),
    ],
)
def test_what_is_no_decoder_is_refused(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        model_class_of(config)


# The small model.


def on_meta(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return model_class_of(config)._from_config(config)


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v3", "granitemoehybrid", "gemma3"])
def test_the_small_model_has_the_same_units(name):
    config = config_of(name)
    before = config.to_dict()
    smallest = next(smaller_configs(config))
    assert config.to_dict() == before
    small, large = on_meta(smallest), on_meta(config)
    found, expected = find_architecture(small), find_architecture(large)
    for mine, other in zip(found.units, expected.units, strict=True):
        assert (mine.block, mine.form, mine.ffns) == (other.block, other.form, other.ffns)
        assert mine.width < other.width / 4
    decoder = large.get_submodule(expected.decoder)
    few = sum(p.numel() for p in small.get_submodule(found.decoder).parameters())
    assert few < sum(p.numel() for p in decoder.parameters()) / 50


def test_the_last_one_has_the_widths_of_the_config_and_all_have_its_special_tokens():
    config = LlamaConfig(pad_token_id=31999, eos_token_id=[2, 30000])
    *_, last = configs = list(smaller_configs(config))
    assert last.vocab_size == 512
    assert (last.hidden_size, last.intermediate_size) == (4096, 11008)
    assert all(max(each.pad_token_id, *each.eos_token_id) < each.vocab_size for each in configs)
    # Small models stay as they are.
    config = LlamaConfig(hidden_size=64, intermediate_size=96, vocab_size=128)
    assert [each.to_dict() for each in smaller_configs(config)] == [config.to_dict()]


# Resizing.


def test_what_is_resized_keeps_its_type_and_may_be_trained_as_before():
    block = nn.Module()
    block.gate_up = nn.Parameter(torch.ones(3, 12, 4, dtype=torch.bfloat16), requires_grad=False)
    block.down, block.width = nn.Parameter(torch.ones(3, 4, 6)), 6
    resize_ffn(block, 9, {"gate_up": (1, 2), "down": (2, 1)}, [("", "width", 1)])
    assert (block.gate_up.shape, block.down.shape, block.width) == ((3, 18, 4), (3, 4, 9), 9)
    assert (block.gate_up.dtype, block.gate_up.requires_grad) == (torch.bfloat16, False)
    assert (block.down.dtype, block.down.requires_grad) == (torch.float32, True)
    assert list(dict(block.named_parameters())) == ["gate_up", "down"]
    with pytest.raises(AttributeError, match="other"):
        resize_ffn(block, 9, {"other": (0, 1)}, [])


def test_its_source_needs_nothing_but_torch():
    modules = set(re.findall(r"(?m)^\s*(?:from|import) (\S+)", inspect.getsource(resizing)))
    assert modules == {"__future__", "collections", "collections.abc", "typing", "torch"}

"""KV groups: found, refused, pruned in steps and again; cut/test_removals.py has their cutting."""

import json
from typing import Any

import pytest

import cfsp
from cfsp.architecture.discovery import find_architecture
from cfsp.architecture.model_classes import empty_stock_model
from cfsp.architecture.proof import prove
from cfsp.checkpoint.pruned_config import config_changes
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.planning.allocation import ModelSize, UnitSize, allocate
from cfsp.settings import Budget, Part
from family_contract import by_plan, check_is_the_same, check_masked_is_cut
from tiny_decoders import tiny_config

PARTS: tuple[Part, ...] = ("ffn", "kv")


def test_the_stages_one_by_one_and_the_report(model, few, text_file, tmp_path, command):
    cfsp.calibrate(model, parts=PARTS, **few).save(tmp_path / "statistics")
    statistics = cfsp.Statistics.load(tmp_path / "statistics")
    (attention,) = (unit for unit in statistics.units if unit.block == 1 and unit.part == "kv")
    assert attention.distance_sum is not None and attention.distance_sum > 0
    assert attention.distance_sum != statistics.blocks[1].distance_sum
    asked: Any = {"goal": cfsp.TargetParameters(0.8), "parts": PARTS, "multiple": 1}
    plan = cfsp.plan(model, statistics, block_metric="angular", **asked)
    assert cfsp.PruningPlan.from_json(plan.to_json()) == plan
    of_channels = cfsp.calibrate(model, **few)
    # Statistics of more parts serve for fewer.
    plans = [cfsp.plan(model, each, sparsity=0.5) for each in (statistics, of_channels)]
    assert plans[0] == plans[1]
    with pytest.raises(cfsp.CfspError, match="calibrate with the same --parts"):
        cfsp.plan(model, of_channels, block_metric="angular", **asked)
    by_plan(model, plan, tmp_path / "by-plan", text_file)
    out = tmp_path / "direct"
    cfsp.prune(model, out=out, repair="none", **asked, **few)
    check_is_the_same(tmp_path / "by-plan", out)
    command("report", out, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for said in ("1 of 2 KV groups", "FFN channels", "What each attention layer", "1 self_attn"):
        assert said in page
    assert "KV groups" in (out / "README.md").read_text()


def test_equally_many_groups_give_a_stock_checkpoint(make_case, command):
    case = make_case("llama", {}, sparsity=0.5, parts="kv")
    assert case.report.kv_groups["after"] == [1, 1, 1]
    assert case.report.intermediate_sizes == [96, 96, 96]
    fields = json.loads((case.out / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == (2, 1)
    assert not list(case.out.glob("*.py"))
    command("verify", case.out)
    check_masked_is_cut(case)


def test_a_stock_class_may_have_a_config_by_block_of_its_own(make_case):
    """Gemma 4 says there how large the heads of some blocks are."""
    changes = {"global_head_dim": 32}
    case = make_case("gemma4_text", changes, sparsity=0.34, parts="kv")
    assert len({*case.report.kv_groups["after"]}) > 1
    check_masked_is_cut(case)


def test_equally_many_groups_that_a_stock_config_refuses(make_case):
    """A hidden size of 32 is no multiple of six heads."""
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    case = make_case("llama", changes, sparsity=0.25, parts="kv", widths="equal")
    assert case.report.kv_groups["after"] == [3, 3, 3]
    assert list(case.out.glob("*.py"))
    check_masked_is_cut(case)


def test_a_hidden_size_as_large_as_all_heads_is_no_number_of_heads():
    """The class of EXAONE 4 keeps it; if it were cut too, no stock config would build the rest."""
    config = tiny_config("exaone4", head_dim=8)
    model = empty_stock_model(config)
    first = find_architecture(model, "kv").units[0]
    number = "self_attn", "hidden_size", 16
    assert number in first.attributes
    readings = list(first.readings())
    assert [number in each.attributes for each in readings] == [False, True]
    assert [first.as_proved(each) for each in readings] == readings
    found = prove(config, ("kv",)).of_part("kv")
    assert found.units[0].attributes == readings[0].attributes
    changes = config_changes(config, found, [1, 1, 1])
    assert changes.file is None
    assert changes.text == {"num_attention_heads": 2, "head_dim": 8, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v3", "self_attn failed the check heads"),
        ("mamba2", "has no FFN in its 3 blocks"),
        ("olmo2", "self_attn failed the check cut"),
        ("gpt_bigcode", "expected two KV groups or more"),
        # Its config has another number of heads for each block.
        ("dots3_note_text", "self_attn failed the check heads"),
    ],
)
def test_what_has_no_kv_groups_is_refused_by_name(name, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        prove(tiny_config(name), ("kv",))


def test_attentions_of_some_blocks_are_enough():
    found = prove(tiny_config("qwen3_next"), ("kv",))
    assert [unit.path for unit in found.of_part("kv").units] == ["self_attn"]
    assert any("linear_attn" in refusal.module for refusal in found.refused)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5_text"])
def test_convolutions_and_delta_nets_are_no_attention_layers(name):
    """Their matrices may have the shapes of whole heads."""
    found = prove(tiny_config(name), ("attention",))
    assert [(unit.block, unit.path) for unit in found.of_part("kv").units] == [(2, "self_attn")]
    assert [refusal.module[:14] for refusal in found.refused] == [
        "model.layers.0",
        "model.layers.1",
    ]


def test_the_hidden_state_after_attention_is_found():
    for name, changes, after in (
        ("llama", {}, "post_attention_layernorm"),
        ("gemma3_text", {}, "pre_feedforward_layernorm"),
        ("gptj", {}, None),
        # What entered the block enters the norm before the FFN, with or without attention.
        ("gpt_neox", {}, None),
        ("gpt_neox", {"use_parallel_residual": False}, "post_attention_layernorm"),
        # The last block adds a bias of the output, which is as long as all heads.
        ("gpt_neox_japanese", {}, "post_attention_layernorm"),
    ):
        found = prove(tiny_config(name, **changes), ("kv",)).of_part("kv")
        assert [unit.after for unit in found.units] == [after] * 3


def test_one_group_of_every_attention_stays():
    units = (UnitSize(4, 1000, part="kv"), UnitSize(100, 60)) * 2
    size = ModelSize(units, 100_000)
    alone = allocate([0.9, 0.5, 0.3, 0.4], Budget(0.3, parts="kv"), size, "water-fill")
    assert [alone[1], alone[3]] == [100, 100]
    assert sum(alone[::2]) == 6
    with pytest.raises(BudgetError, match="one KV group in every attention"):
        allocate([0.9, 0.5, 0.3, 0.4], Budget(0.95, parts="kv"), size)

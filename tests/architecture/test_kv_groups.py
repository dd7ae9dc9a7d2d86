"""KV groups of tiny models of several families: found, proved, cut, and read by stock software."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from builders import goal_of_share
from cfsp.architecture.found import ChannelAxis
from cfsp.architecture.proof import prove
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import KV_GROUPS, architecture_of, blocks_of
from cfsp.cli import main
from cfsp.errors import BudgetError, UnsupportedModelError
from cfsp.planning.allocation import ModelSize, UnitSize, allocate
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import Budget, Part
from family_contract import (
    SETTINGS,
    Case,
    by_plan,
    check_a_fresh_process_keeps_the_contract,
    check_caches_agree_with_none,
    check_in_memory_is_the_checkpoint,
    check_is_the_same,
    check_masked_is_cut,
    logits_of,
    save_with_tokenizer,
)
from tiny_decoders import tiny_config, tiny_model

PARTS: tuple[Part, ...] = ("ffn", "kv")
# Biases, norms of queries and keys and after attention, queries, keys and values in one matrix, and
# as many heads of keys and values as of queries.
NAMES = ("qwen2", "gemma3_text", "phi3", "gpt2")


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    goal = goal_of_share(tiny_model(request.param), PARTS, 0.4)
    found = make_case(request.param, {}, goal=goal, multiple=1, parts=PARTS)
    assert len(set(found.report.kv_groups["after"])) > 1, "the case must have different numbers"
    return found


def test_masked_is_cut(case):
    check_masked_is_cut(case)


def test_caches_agree_with_none(case):
    check_caches_agree_with_none(case)


@pytest.mark.parametrize("case", ["gemma3_text", "phi3"], indirect=True)
def test_a_fresh_process_keeps_the_contract(case, forks, tmp_path):
    check_a_fresh_process_keeps_the_contract(case, forks, tmp_path)


def test_in_memory_is_the_checkpoint(case, tmp_path):
    check_in_memory_is_the_checkpoint(case, tmp_path)


def test_config_and_modules_say_the_numbers(case):
    groups = case.report.kv_groups["after"]
    fields = json.loads((case.out / "config.json").read_text())
    assert [count for block in fields[KV_GROUPS].values() for count in block.values()] == groups
    found = Checkpoint(case.out).architecture.of_part("kv")
    assert found.widths == groups
    model, architecture = cfsp.load(case.out), architecture_of(case.dense.config, PARTS)
    for unit, count in zip(architecture.of_part("kv").units, groups, strict=True):
        block = blocks_of(model, architecture)[unit.block]
        for path, number, times in unit.attributes:
            assert getattr(block.get_submodule(path), number) == times * count
        for name, axis in unit.axes.items():
            assert axis.width(block.get_parameter(name).shape) == count


@pytest.mark.parametrize("case", ["qwen2", "gpt2"], indirect=True)
def test_repair_lowers_the_error(case, tmp_path):
    # Without sensitivity: that of a random model keeps its attentions.
    asked = {**case.asked, "multiple": 8, "repair": "local", "block_metric": "angular"}
    asked["local_steps"] = 1
    report = cfsp.prune(case.source, out=tmp_path / "out", **asked)
    ridge, *later = report.repair["steps"]
    of_attention = [entry for entry in ridge["blocks"] if "attn" in entry["path"]]
    assert len(of_attention) == len(case.report.kv_groups["before"])
    assert any(entry["error_after"] < entry["error_before"] for entry in of_attention)
    assert [step["name"] for step in later] == ["sequential", "local"]
    logits_of(cfsp.load(tmp_path / "out"), case.tokens_BT)


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama") / "dense"
    save_with_tokenizer(tiny_model("llama"), tokenizer, place)
    return place


def test_what_lost_groups_is_pruned_again(llama, text_file, tmp_path):
    asked: dict[str, Any] = {"multiple": 1, "repair": "none", "data": [str(text_file)], **SETTINGS}
    first = cfsp.prune(llama, out=tmp_path / "once", parts="kv", sparsity=0.35, **asked)
    groups = first.kv_groups["after"]
    assert len(set(groups)) > 1
    again = cfsp.prune(tmp_path / "once", out=tmp_path / "twice", sparsity=0.3, **asked)
    # Only FFN channels may go now; the heads stay as they are.
    assert again.kv_groups["after"] == groups
    assert sum(again.intermediate_sizes) < sum(first.intermediate_sizes)
    assert Checkpoint(tmp_path / "twice").architecture.of_part("kv").widths == groups
    logits_of(cfsp.load(tmp_path / "twice"), torch.arange(2, 26).view(2, 12))


def test_the_stages_one_by_one_and_the_report(llama, text_file, tmp_path):
    text: dict[str, Any] = {"data": [str(text_file)], **SETTINGS}
    cfsp.calibrate(llama, parts=PARTS, **text).save(tmp_path / "statistics")
    statistics = cfsp.Statistics.load(tmp_path / "statistics")
    (attention,) = (unit for unit in statistics.units if unit.block == 1 and unit.part == "kv")
    assert attention.distance_sum is not None and attention.distance_sum > 0
    assert attention.distance_sum != statistics.blocks[1].distance_sum
    asked: dict[str, Any] = {"goal": cfsp.TargetParameters(0.8), "parts": PARTS, "multiple": 1}
    plan = cfsp.plan(llama, statistics, block_metric="angular", **asked)
    assert PruningPlan.from_json(plan.to_json()) == plan
    by_plan(llama, plan, tmp_path / "by-plan", text_file)
    out = tmp_path / "direct"
    cfsp.prune(llama, out=out, repair="none", **asked, **text)
    check_is_the_same(tmp_path / "by-plan", out)
    assert main(["report", str(out), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    for said in ("KV groups", "FFN channels", "What each attention layer", "1 self_attn"):
        assert said in page
    assert "KV groups" in (out / "README.md").read_text()


def test_equally_many_groups_give_a_stock_checkpoint(make_case):
    case = make_case("llama", {}, sparsity=0.5, parts="kv")
    assert case.report.kv_groups["after"] == [1, 1, 1]
    assert case.report.intermediate_sizes == [96, 96, 96]
    fields = json.loads((case.out / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == (2, 1)
    assert not list(case.out.glob("*.py"))
    assert main(["verify", str(case.out)]) == 0
    check_masked_is_cut(case)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v3", "self_attn failed the check heads"),
        ("mamba2", "mixer failed the check heads"),
        ("olmo2", "self_attn failed the check cut"),
        ("gpt_bigcode", "expected two KV groups or more"),
        # Its config has another number of heads for each block.
        ("dots3_note_text", "self_attn failed the check heads"),
    ],
)
def test_what_has_no_kv_groups_is_refused_by_name(name, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        prove(tiny_config(name), None, ("kv",))


def test_attentions_of_some_blocks_are_enough():
    found = prove(tiny_config("qwen3_next"), None, ("kv",))
    assert [unit.path for unit in found.of_part("kv").units] == ["self_attn"]
    assert any("linear_attn" in refusal.module for refusal in found.refused)


def test_the_hidden_state_after_attention_is_found():
    for name, after in (
        ("llama", "post_attention_layernorm"),
        ("gemma3_text", "pre_feedforward_layernorm"),
        ("gptj", None),
    ):
        found = prove(tiny_config(name), None, ("kv",)).of_part("kv")
        assert {unit.after for unit in found.units} == {after}


def test_an_axis_in_sections():
    axis = ChannelAxis(0, spans=(4, 2, 2))
    # Three KV groups of two query heads with a size of 2.
    rows = torch.arange(24)
    assert axis.width(rows.shape) == 3
    assert axis.select(rows, [0, 2]).tolist() == [*range(4), *range(8, 14), 16, 17, 18, 19, 22, 23]


def test_one_group_of_every_attention_stays():
    units = (UnitSize(4, 1000, "attn", part="kv"), UnitSize(100, 60, "mlp")) * 2
    size = ModelSize(units, 100_000)
    alone = allocate([0.9, 0.5, 0.3, 0.4], Budget(0.3, parts="kv"), size, "water-fill")
    assert [alone[1], alone[3]] == [100, 100]
    assert sum(alone[::2]) == 6
    with pytest.raises(BudgetError, match="one KV group in every attention"):
        allocate([0.9, 0.5, 0.3, 0.4], Budget(0.95, parts="kv"), size)

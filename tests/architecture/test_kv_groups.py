"""KV groups of tiny models of several families: found, proved, cut, and read by stock software."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cfsp
from builders import goal_of_share
from cfsp.architecture.found import ChannelAxis
from cfsp.architecture.proof import prove
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.config_widths import KV_GROUPS
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import architecture_of, blocks_of
from cfsp.cli import main
from cfsp.errors import BudgetError, CfspError, StatisticsError, UnsupportedModelError
from cfsp.exports.registry import export_checkpoint
from cfsp.planning.allocation import ModelSize, UnitSize, allocate
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import Budget, Part
from family_contract import save_with_tokenizer
from forks import Forks
from pruned_checks import (
    SETTINGS,
    Case,
    check_a_fresh_process_keeps_the_contract,
    check_caches_agree_with_none,
    check_in_memory_is_the_checkpoint,
    check_masked_is_cut,
    logits_of,
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


def test_masked_is_cut(case: Case) -> None:
    check_masked_is_cut(case)


def test_caches_agree_with_none(case: Case) -> None:
    check_caches_agree_with_none(case)


def test_a_fresh_process_keeps_the_contract(case: Case, forks: Forks, tmp_path: Path) -> None:
    check_a_fresh_process_keeps_the_contract(case, forks, tmp_path)


def test_in_memory_is_the_checkpoint(case: Case, tmp_path: Path) -> None:
    check_in_memory_is_the_checkpoint(case, tmp_path)


def test_config_and_modules_say_the_numbers(case: Case) -> None:
    groups = case.report.kv_groups["after"]
    fields = json.loads((case.out / "config.json").read_text())
    assert [count for block in fields[KV_GROUPS].values() for count in block.values()] == groups
    found = Checkpoint(case.out).architecture.of_part("kv")
    assert found.widths == groups
    model, architecture = cfsp.load(case.out), architecture_of(case.dense.config, PARTS)
    for unit, count in zip(architecture.of_part("kv").units, groups, strict=True):
        block = blocks_of(model, architecture)[unit.block]
        for attribute in unit.attributes:
            value = getattr(block.get_submodule(attribute.module), attribute.name)
            assert value == attribute.times * count
        for name, axis in unit.axes.items():
            assert axis.width(block.get_parameter(name).shape) == count


@pytest.mark.parametrize("case", ["phi3"], indirect=True)
def test_inspect_and_verify_agree(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["inspect", str(case.out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kv_groups"] == case.report.kv_groups["after"]
    assert told["intermediate_sizes"] == case.report.intermediate_sizes
    assert main(["verify", str(case.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]


def test_the_plan_names_each_part_and_is_read_again(case: Case) -> None:
    plan = PruningPlan.load(case.out / PLAN_FILE)
    assert plan == case.report.plan
    assert json.loads(plan.to_json())["plan_version"] == 2
    assert plan.parts == PARTS
    kept = sum(unit.kept_width * unit.cost for unit in plan.units)
    whole = sum(unit.width * unit.cost for unit in plan.units)
    # A step is a KV group or a channel.
    assert kept / whole == pytest.approx(0.6, abs=max(u.cost for u in plan.units) / whole)


@pytest.mark.parametrize("case", ["qwen2", "gpt2"], indirect=True)
def test_repair_lowers_the_error(case: Case, tmp_path: Path) -> None:
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


def test_what_lost_groups_is_pruned_again(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    save_with_tokenizer(tiny_model("llama"), tokenizer, tmp_path / "dense")
    asked = {"multiple": 1, "repair": "none", "block_metric": "angular", "data": [str(text_file)]}
    first = cfsp.prune(
        tmp_path / "dense", out=tmp_path / "once", parts="kv", sparsity=0.35, **asked, **SETTINGS
    )
    groups = first.kv_groups["after"]
    assert len(set(groups)) > 1
    again = cfsp.prune(tmp_path / "once", out=tmp_path / "twice", sparsity=0.3, **asked, **SETTINGS)
    # Only FFN channels may go now; the heads stay as they are.
    assert again.kv_groups["after"] == groups
    assert sum(again.intermediate_sizes) < sum(first.intermediate_sizes)
    assert Checkpoint(tmp_path / "twice").architecture.of_part("kv").widths == groups
    logits_of(cfsp.load(tmp_path / "twice"), torch.arange(2, 26).view(2, 12))


def test_the_report_shows_both_parts(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    save_with_tokenizer(tiny_model("llama"), tokenizer, tmp_path / "dense")
    cfsp.prune(
        tmp_path / "dense", out=tmp_path / "out", goal=cfsp.TargetParameters(0.8), parts=PARTS,
        multiple=8, block_metric="angular", data=[str(text_file)], **SETTINGS,
    )  # fmt: skip
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "out"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "KV groups" in text and "FFN channels" in text
    assert "What each attention layer" in text
    assert "1 self_attn" in text
    assert "KV groups" in (tmp_path / "out" / "README.md").read_text()


def test_the_stages_one_by_one(tokenizer: Any, text_file: Path, tmp_path: Path) -> None:
    source, saved = tmp_path / "dense", tmp_path / "stats.safetensors"
    save_with_tokenizer(tiny_model("llama"), tokenizer, source)
    text = ["--data", str(text_file), "--samples", "6", "--seqlen", "32", "--device", "cpu"]
    assert main(["calibrate", str(source), "--parts", "ffn,kv", *text, "--out", str(saved)]) == 0
    statistics = Statistics.load(saved)
    (attention,) = (unit for unit in statistics.units if unit.block == 1 and unit.part == "kv")
    assert attention.distance_sum is not None and attention.distance_sum > 0
    assert attention.distance_sum != statistics.blocks[1].distance_sum
    plan = tmp_path / "plan.json"
    asked = ["--statistics", str(saved), "--target-params", "0.8", "--set", "multiple=1"]
    assert main(["plan", str(source), *asked, "--parts", "kv,ffn", "--out", str(plan)]) == 0
    asked = ["--plan", str(plan), "--repair", "none"]
    assert main(["prune", str(source), *asked, "--out", str(tmp_path / "by-plan")]) == 0
    cfsp.prune(
        source, out=tmp_path / "direct", goal=cfsp.TargetParameters(0.8), parts=PARTS, multiple=1,
        repair="none", data=[str(text_file)], **SETTINGS,
    )  # fmt: skip
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("by-plan", "direct")
    )
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())


def test_statistics_of_other_parts_are_refused(
    tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    dense = tiny_model("llama")
    statistics = cfsp.calibrate(dense, tokenizer, data=[str(text_file)], **SETTINGS)
    with pytest.raises(StatisticsError, match="calibrate with the same --parts"):
        cfsp.plan(dense, statistics, sparsity=0.2, parts="kv")


def test_equally_many_groups_give_a_stock_checkpoint(make_case: Callable[..., Case]) -> None:
    case = make_case("llama", {}, sparsity=0.5, parts="kv")
    assert case.report.kv_groups["after"] == [1, 1, 1]
    assert case.report.intermediate_sizes == [96, 96, 96]
    fields = json.loads((case.out / "config.json").read_text())
    assert fields["architectures"] == ["LlamaForCausalLM"]
    assert (fields["num_attention_heads"], fields["num_key_value_heads"]) == (2, 1)
    assert not list(case.out.glob("*.py"))
    assert main(["verify", str(case.out)]) == 0
    check_masked_is_cut(case)


def test_what_has_no_kv_groups_is_refused_by_name() -> None:
    for name, reason in (
        ("deepseek_v3", "self_attn failed the check heads"),
        ("mamba2", "mixer failed the check heads"),
        ("olmo2", "self_attn failed the check cut"),
        ("gpt_bigcode", "expected two KV groups or more"),
    ):
        with pytest.raises(UnsupportedModelError, match=reason):
            prove(tiny_config(name), None, ("kv",))


def test_attentions_of_some_blocks_are_enough() -> None:
    found = prove(tiny_config("qwen3_next"), None, ("kv",))
    assert [unit.path for unit in found.of_part("kv").units] == ["self_attn"]
    assert any("linear_attn" in refusal.module for refusal in found.refused)


def test_the_hidden_state_after_attention_is_found() -> None:
    for name, after in (
        ("llama", "post_attention_layernorm"),
        ("gemma3_text", "pre_feedforward_layernorm"),
        ("gptj", None),
    ):
        found = prove(tiny_config(name), None, ("kv",)).of_part("kv")
        assert {unit.after for unit in found.units} == {after}


def test_an_axis_in_sections() -> None:
    axis = ChannelAxis(0, spans=(4, 2, 2))
    # Three KV groups of two query heads with a size of 2.
    rows = torch.arange(24)
    assert axis.width(rows.shape) == 3
    assert axis.select(rows, [0, 2]).tolist() == [*range(4), *range(8, 14), 16, 17, 18, 19, 22, 23]
    assert axis.in_one_section().select(rows, [1]).tolist() == list(range(8, 16))


def test_a_budget_of_two_parts_is_met_by_channels() -> None:
    units = (UnitSize(4, 1000, "attn", part="kv"), UnitSize(100, 60, "mlp")) * 2
    size = ModelSize(units, 100_000)
    budget = Budget(0.3, multiple=1, parts=PARTS)
    kept = allocate([0.9, 0.5, 0.3, 0.4], budget, size, "water-fill")
    assert size.cost_of(kept) == pytest.approx(0.7 * size.cost_of(size.width_U), abs=3)
    alone = allocate([0.9, 0.5, 0.3, 0.4], Budget(0.3, parts="kv"), size, "water-fill")
    assert [alone[1], alone[3]] == [100, 100]
    assert sum(alone[::2]) == 6
    with pytest.raises(BudgetError, match="one KV group in every attention"):
        allocate([0.9, 0.5, 0.3, 0.4], Budget(0.95, parts="kv"), size)


@pytest.mark.parametrize("case", ["qwen2"], indirect=True)
def test_exports_that_cannot_have_own_heads_refuse(case: Case, tmp_path: Path) -> None:
    for target, message in (
        ("openvino", "differ in KV groups, which --to gguf can say"),
        ("vllm", "one number of heads for all attentions|cannot express"),
    ):
        with pytest.raises(CfspError, match=message):
            export_checkpoint(Checkpoint(case.out), target, tmp_path / target)
        assert not (tmp_path / target).exists()

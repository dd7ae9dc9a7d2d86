"""Whole experts go in one run with blocks and attentions: what is masked is what is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import cfsp
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.stored_blocks import (
    parameters_of_an_expert,
    parameters_of_attentions,
    parameters_of_blocks,
)
from cfsp.cli import main
from cfsp.errors import UsageError
from cfsp.settings import Part
from cfsp.whole_model.masks import masked_channels
from family_contract import save_with_tokenizer
from pruned_checks import (
    SETTINGS,
    Case,
    check_in_memory_is_the_checkpoint,
    check_its_plan_gives_the_same,
    generated,
    logits_of,
    nothing_from,
)
from tiny_decoders import tiny_model

ALL: tuple[Part, ...] = ("attention", "blocks", "experts")
BLOCKS, BOTH = {"remove_blocks": 1}, {"remove_blocks": 1, "remove_attentions": 1}
# With a shared expert; with a dense first block, groups of experts and latent attention.
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, int]]] = {
    "mixtral": ("mixtral", {"num_hidden_layers": 4}, "blocks,experts", BLOCKS),
    "qwen2_moe": ("qwen2_moe", {"num_hidden_layers": 4}, "attention,blocks,experts", BOTH),
    "deepseek_v3": (
        "deepseek_v3",
        {"num_hidden_layers": 4, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        "attention,blocks,experts",
        BOTH,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    model_type, config, parts, counts = CASES[request.param]
    asked = {"parts": parts, "sparsity": 0.0, "remove_experts": 2, **counts}
    return make_case(model_type, config, **asked)


def test_what_is_masked_is_cut(case: Case) -> None:
    plan, source = case.report.plan, LoadedModel(case.dense, ("experts",))
    assert len(plan.removed_blocks) == 1
    assert len(plan.removed_attentions) == case.asked.get("remove_attentions", 0)
    experts = [unit.kept for unit in plan.units if unit.part == "ffn"]
    assert len(experts) == len(source.units)
    kept = {index: kept_K for index, kept_K in enumerate(experts) if kept_K}
    with nothing_from(case.dense, plan), masked_channels(source, case.dense, kept):
        expected = logits_of(case.dense, case.tokens_BT)
    actual = logits_of(cfsp.load(case.out), case.tokens_BT)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if not plan.removed_attentions:
        stock, info = AutoModelForCausalLM.from_pretrained(case.out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(logits_of(stock.eval(), case.tokens_BT), actual)


def test_every_parameter_is_counted_once(case: Case) -> None:
    plan, source = case.report.plan, Checkpoint(case.source, parts=ALL)
    each = parameters_of_an_expert(source)
    gone = sum(parameters_of_blocks(source)[block] for block in plan.removed_blocks)
    gone += sum(parameters_of_attentions(source)[block] for block in plan.removed_attentions)
    gone += 2 * sum(size for block, size in each.items() if block not in plan.removed_blocks)
    assert case.report.parameters_before - case.report.parameters_after == gone


def test_in_memory_is_the_checkpoint(case: Case, tokenizer: Any, tmp_path: Path) -> None:
    check_in_memory_is_the_checkpoint(case, tokenizer, tmp_path)
    model = cfsp.load(case.out)
    expected = generated(model, case.tokens_BT, use_cache=False)
    assert torch.equal(generated(model, case.tokens_BT), expected)


def test_commands_tell_of_all(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = case.report.plan
    check_its_plan_gives_the_same(case, tmp_path)
    told = capsys.readouterr().out
    assert plan.experts_in_words in told and f"removed: {plan.removed_in_words}" in told
    assert main(["inspect", str(case.out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["experts"] == plan.kept_experts
    assert facts["pruned"]["removed_blocks"] == list(plan.removed_blocks)
    assert main(["inspect", str(case.out)]) == 0
    told = capsys.readouterr().out
    assert plan.removed_in_words in told and "2 of " in told
    card = (case.out / "README.md").read_text()
    assert plan.removed_in_words in card
    assert f"and without 2 of the {facts['experts'] + 2} experts of each block" in card
    assert main(["verify", str(case.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]
    assert main(["report", str(case.out), "--out", str(tmp_path / "report.html")]) == 0


@pytest.fixture(scope="module")
def mixtral(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mixtral") / "dense"
    save_with_tokenizer(tiny_model("mixtral", num_hidden_layers=5), tokenizer, place)
    return place


@pytest.mark.parametrize("removal", ["divergence", "runs"])
def test_a_number_of_parameters_is_met_by_blocks(
    mixtral: Path, text_file: Path, tmp_path: Path, removal: str
) -> None:
    """A block counts without the experts that go."""
    report = cfsp.prune(
        mixtral, out=tmp_path / "out", parts="blocks,experts", remove_experts=2, removal=removal,
        goal=cfsp.TargetParameters(0.5), data=[str(text_file)], **SETTINGS,
    )  # fmt: skip
    source = Checkpoint(mixtral, parts=ALL)
    block = parameters_of_blocks(source)[0] - 2 * parameters_of_an_expert(source)[0]
    before, after = report.parameters_before, report.parameters_after
    assert report.plan.kept_experts == 2
    assert 1 <= len(report.plan.removed_blocks) <= 3
    assert abs(after - 0.5 * before) <= block / 2
    # Its scores are of the whole text, not of the little that blocks require.
    assert report.plan.calibration["windows"] == SETTINGS["samples"]


@pytest.mark.parametrize("parts", ["ffn,blocks,experts", "ffn,attention,experts"])
def test_how_many_go_beside_channels_is_tried_without_these_experts(
    mixtral: Path, text_file: Path, tmp_path: Path, parts: str
) -> None:
    report = cfsp.prune(
        mixtral, out=tmp_path / "out", parts=parts, remove_experts=1, multiple=8,
        goal=cfsp.TargetParameters(0.5), data=[str(text_file)], **SETTINGS,
    )  # fmt: skip
    assert report.plan.kept_experts == 3
    assert report.parameters_after == pytest.approx(0.5 * report.parameters_before, rel=0.03)
    assert report.repair["steps"][0]["name"] == "ridge"
    tokens_BT = torch.arange(2, 26).view(2, 12)
    model = cfsp.load(tmp_path / "out")
    assert torch.equal(generated(model, tokens_BT), generated(model, tokens_BT, use_cache=False))


def test_blocks_of_experts_alone_have_no_step_of_repair(
    mixtral: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing beside a gap could take over what went; the command says so, and goes on."""
    asked = ["--parts", "blocks,experts", "--set", "remove_experts=1", "--sparsity", "0.2"]
    asked += ["--data", str(text_file), "--samples", "6", "--seqlen", "32", "--device", "cpu"]
    assert main(["prune", str(mixtral), *asked, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "what was removed is not made up for in 1 of the 1 blocks" in told.err
    assert "repaired" not in told.out
    assert main(["inspect", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert "repair             none" in told.out and "(REAP)" in told.out


def test_plans_from_statistics(mixtral: Path, text_file: Path) -> None:
    statistics = cfsp.calibrate(mixtral, parts="blocks,experts", data=[str(text_file)], **SETTINGS)
    for experts in (0, 1, 2):
        plan = cfsp.plan(
            mixtral, statistics, parts="blocks,experts", sparsity=0.4, remove_experts=experts
        )
        assert len(plan.removed_blocks) == 2  # of five that are as large
        assert plan.kept_experts == (4 - experts if experts else None)
    with pytest.raises(UsageError, match="--set remove_experts=N"):
        cfsp.plan(mixtral, statistics, parts="blocks,experts", sparsity=0.4)

"""Whole attentions go: nothing from them is cut, for stock software and with any cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import cfsp
from builders import plan_without
from cfsp.architecture.resizing import Gone
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.skeleton import blocks_of
from cfsp.checkpoint.stored_blocks import parameters_of_attentions
from cfsp.cli import main
from cfsp.cut.surgery import pruned_specs
from cfsp.engine.block_proof import check_attentions_can_go
from cfsp.errors import BudgetError, UnsupportedModelError, UsageError
from cfsp.planning.candidate import Dropped
from cfsp.selection.constraint import Share
from cfsp.settings import Budget, Repair
from family_contract import save_with_tokenizer
from forks import Forks
from pruned_checks import (
    SETTINGS,
    Case,
    check_a_fresh_process_keeps_the_contract,
    check_caches_agree_with_none,
    check_in_memory_is_the_checkpoint,
    check_is_the_same,
    check_its_plan_gives_the_same,
    generated,
    logits_of,
    nothing_from,
)
from tiny_decoders import tiny_model

ATTENTION = ("attention",)
_SLIDING, _FULL = "sliding_attention", "full_attention"
# Grouped heads, biases, norms of queries and keys, two kinds of cache, queries, keys and values in
# one matrix, and a bias of the output.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 5},
    "qwen2": {"num_hidden_layers": 4},
    "qwen3": {"num_hidden_layers": 4},
    "gemma3_text": {
        "num_hidden_layers": 5,
        "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING],
    },
    "phi3": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4},
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    asked = {"parts": "attention", "remove_attentions": 2}
    return make_case(request.param, CONFIGS[request.param], **asked)


def test_nothing_from_it_is_cut(case: Case) -> None:
    with nothing_from(case.dense, case.report.plan):
        expected = logits_of(case.dense, case.tokens_BT)
    actual = logits_of(cfsp.load(case.out), case.tokens_BT)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits_of(case.dense, case.tokens_BT)).abs().max() > 1e-2
    assert len(case.removed_attentions) == 2
    owned = parameters_of_attentions(Checkpoint(case.source, parts=ATTENTION))
    gone = case.report.parameters_before - case.report.parameters_after
    assert gone == sum(owned[block] for block in case.removed_attentions)


def test_caches_agree_with_none(case: Case) -> None:
    check_caches_agree_with_none(case)


def test_padding_on_the_left_changes_nothing(case: Case) -> None:
    model = cfsp.load(case.out)
    short, long = case.tokens_BT[0, :5], case.tokens_BT[1]
    padding = len(long) - len(short)
    batch = torch.stack([torch.cat([short.new_zeros(padding), short]), long])
    mask = torch.ones_like(batch)
    mask[0, :padding] = 0
    for options in ({}, {"cache_implementation": "static"}):
        found = generated(model, batch, attention_mask=mask, **options)
        assert torch.equal(found[0, padding:], generated(model, short[None], use_cache=False)[0])
        assert torch.equal(found[1], generated(model, long[None], use_cache=False)[0])


def test_places_in_the_cache_are_filled_from_the_first_of_their_kind(case: Case) -> None:
    model = cfsp.load(case.out)
    blocks = blocks_of(model, Checkpoint(case.out).architecture)
    units = Checkpoint(case.source, parts=ATTENTION).architecture.of_part("kv").units
    kinds = getattr(model.config, "layer_types", None) or [None] * len(blocks)
    filled: dict[object, list[int]] = {}
    for unit in units:
        attention: Any = blocks[unit.block].get_submodule(unit.path)
        assert (type(attention).__name__ == Gone.__name__) is (
            unit.block in case.removed_attentions
        )
        if unit.block not in case.removed_attentions:
            filled.setdefault(kinds[unit.block], []).append(attention.layer_idx)
    for kind, places in filled.items():
        of_kind = [block for block in range(len(blocks)) if kinds[block] == kind]
        assert places == of_kind[: len(places)]
    assert set(filled) == set(kinds)


def test_a_fresh_process_keeps_the_contract(case: Case, forks: Forks, tmp_path: Path) -> None:
    check_a_fresh_process_keeps_the_contract(case, forks, tmp_path)


def test_in_memory_is_the_checkpoint(case: Case, tokenizer: Any, tmp_path: Path) -> None:
    pruned = cfsp.prune(case.dense, tokenizer, repair="none", **case.asked)
    check_in_memory_is_the_checkpoint(case, pruned, tmp_path)


def test_nothing_removed_changes_no_bit(case: Case, tmp_path: Path) -> None:
    asked = {**case.asked, "remove_attentions": 0}
    cfsp.prune(case.source, out=tmp_path / "same", **asked)
    check_is_the_same(case.source, tmp_path / "same")


def test_the_plan_is_obeyed_and_commands_tell_of_it(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = case.report.plan
    assert [unit.kept_width == 0 for unit in plan.of_part("kv")] == [
        unit.block in case.removed_attentions for unit in plan.of_part("kv")
    ]
    check_its_plan_gives_the_same(case, tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(case.out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kv_groups"] == case.report.kv_groups["after"]
    assert told["pruned"]["removed_attentions"] == case.removed_attentions
    assert main(["inspect", str(case.out)]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("pruned "))
    assert f"{plan.removed_in_words}, in all " in said
    assert "KV groups" in said and "FFN" not in said
    assert "the attentions of block" in (case.out / "README.md").read_text()
    assert main(["verify", str(case.out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]


def test_the_block_takes_over_what_its_attention_did(case: Case, tmp_path: Path) -> None:
    report = cfsp.prune(case.source, out=tmp_path / "out", **case.asked)
    assert report.plan == case.report.plan
    (step,) = report.repair["steps"]
    assert step["name"] == "gaps"
    fitted = [block for block, entry in enumerate(step["blocks"]) if entry is not None]
    assert fitted == case.removed_attentions
    before, after = (load_file(at / "model.safetensors") for at in (case.out, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    source = Checkpoint(case.source)
    assert changed == {
        name
        for unit in source.units
        if unit.block in fitted and step["blocks"][unit.block]["kept"]
        for name in [source.architecture.block_prefix(unit.block) + unit.down]
    }


@pytest.mark.parametrize(
    ("name", "removed", "message"),
    [
        ("llama", (0, 1, 2), "blocks 0 to 2 of .* can't be removed: at least one must stay"),
        ("gemma3_text", (2,), "block 2 .*: at least one of the kind full_attention must stay"),
        ("qwen3_next", (0,), "expected one attention in block 0 whose heads are found, found 0"),
        # Blocks that read the keys and values of others.
        ("gemma3n_text", (0,), "block 0 .* failed the check cut: .*, found KeyError"),
    ],
)
def test_what_the_model_cannot_do_without_is_refused_by_name(
    name: str, removed: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        check_attentions_can_go(LoadedModel(tiny_model(name), ATTENTION), removed)


@pytest.mark.parametrize("name", ["bloom", "mpt", "gemma3n_text"])
def test_what_stock_would_load_with_random_attentions_is_refused_before_any_text(name: str) -> None:
    source = LoadedModel(tiny_model(name), ATTENTION)
    with pytest.raises(UnsupportedModelError, match=r"can't go alone: .*--parts attention,ffn"):
        Share(source, Budget(parts=ATTENTION, remove_attentions=1)).check()
    Share(source, Budget(parts=ATTENTION, remove_attentions=0)).check()
    with pytest.raises(UnsupportedModelError, match="can't go alone"):
        pruned_specs(source, plan_without(source, Dropped((), (1,))))


def test_attentions_can_go_whatever_their_heads_are() -> None:
    # One KV group, beside the FFN, latent, and with norms over all heads together.
    for name in ("gpt_bigcode", "gptj", "deepseek_v3", "olmo2"):
        check_attentions_can_go(LoadedModel(tiny_model(name), ATTENTION), [0, 1])


def test_impossible_budgets_say_what_is_possible(text_file: Path, tokenizer: Any) -> None:
    model = tiny_model("llama")
    asked = {"parts": "attention", "data": [str(text_file)], **SETTINGS}
    with pytest.raises(BudgetError, match="at least one of 3 attention layers must stay; between"):
        cfsp.prune(model, tokenizer, sparsity=0.9, **asked)
    with pytest.raises(BudgetError, match="cannot remove 3 attention layers"):
        cfsp.prune(model, tokenizer, remove_attentions=3, **asked)


@pytest.fixture(scope="module")
def llama(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("llama") / "dense"
    save_with_tokenizer(tiny_model("llama", num_hidden_layers=5), tokenizer, place)
    return place


@pytest.mark.parametrize("repair", ["ridge", "local"])
def test_attentions_and_channels_go_together(
    llama: Path, text_file: Path, tmp_path: Path, repair: Repair
) -> None:
    goal = cfsp.TargetParameters(0.7)
    asked = {"goal": goal, "multiple": 8, "data": [str(text_file)], **SETTINGS}
    asked |= {"parts": "ffn,attention", "repair": repair, "local_steps": 1}
    report = cfsp.prune(llama, out=tmp_path / "out", **asked)
    assert report.model_sparsity == pytest.approx(0.3, rel=0.05)
    names = [step["name"] for step in report.repair["steps"]]
    gaps = ["gaps"] if report.plan.removed_attentions else []
    assert names == ["ridge", *(gaps if repair == "ridge" else ["sequential", "local"])]
    logits_of(cfsp.load(tmp_path / "out"), torch.arange(2, 26).view(2, 12))


def test_order_and_distances_are_in_the_statistics(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "stats.safetensors"
    text = ["--data", str(text_file), "--samples", "6", "--seqlen", "32", "--device", "cpu"]
    asked = ["--parts", "ffn,attention", *text, "--out", str(saved)]
    assert main(["calibrate", str(llama), *asked]) == 0
    statistics = Statistics.load(saved)
    order = [each.block for each in statistics.removals_of(("attention",))]
    assert len(order) == 3 and not statistics.removals_of(("blocks",))  # half of five
    of_attentions = statistics.of_part("kv")
    for removal, expected in (
        ("divergence", order[:2]),
        ("runs", nearest(of_attentions.distances("angular"))),
        ("influence", nearest(of_attentions.distances("cosine"))),
    ):
        plan = cfsp.plan(llama, statistics, sparsity=0.4, parts="attention", removal=removal)
        assert plan.removed_attentions == tuple(sorted(expected))
        assert plan.criterion["removal"] == removal
        assert all(unit.kept_width == unit.width for unit in plan.of_part("ffn"))
    with pytest.raises(UsageError, match="several share one target, --target-params"):
        cfsp.plan(llama, statistics, sparsity=0.4, parts="ffn,attention")


def nearest(distance_L: list[float]) -> list[int]:
    """Return the two blocks of the least distances."""
    return sorted(range(len(distance_L)), key=distance_L.__getitem__)[:2]


def test_what_lost_attentions_is_pruned_again(llama: Path, text_file: Path, tmp_path: Path) -> None:
    asked = {"repair": "none", "data": [str(text_file)], **SETTINGS}
    first = cfsp.prune(llama, out=tmp_path / "1", parts="attention", remove_attentions=1, **asked)
    (gone,) = first.plan.removed_attentions
    asked["sparsity"] = 0.3
    second = cfsp.prune(tmp_path / "1", out=tmp_path / "2", multiple=8, **asked)
    assert Checkpoint(tmp_path / "2").architecture.gone[0].block == gone
    assert sum(second.intermediate_sizes) < sum(first.intermediate_sizes)
    third = cfsp.prune(tmp_path / "2", out=tmp_path / "3", parts="attention", **asked)
    (other,) = third.plan.removed_attentions
    found = Checkpoint(tmp_path / "3")
    assert {unit.block for unit in found.architecture.gone} == {gone, other}
    assert found.architecture.of_part("ffn").widths == second.intermediate_sizes
    last = cfsp.prune(tmp_path / "3", out=tmp_path / "4", parts="blocks", **asked)
    assert Checkpoint(tmp_path / "4").architecture.block_count == 5 - len(last.plan.removed_blocks)
    model = cfsp.load(tmp_path / "4")
    tokens_BT = torch.arange(2, 26).view(2, 12)
    assert torch.equal(generated(model, tokens_BT), generated(model, tokens_BT, use_cache=False))

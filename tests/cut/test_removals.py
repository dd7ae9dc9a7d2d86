"""Blocks, attention layers, experts and KV groups go: what is masked or skipped is cut."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import cfsp
from builders import changed, goal_of_share, parts_of, plan_without, read_json
from cfsp.architecture.block_names import removed_in_words
from cfsp.architecture.resizing import Gone
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.checkpoint.skeleton import KV_GROUPS, blocks_of
from cfsp.checkpoint.stock_keys import warn_of_rhythm
from cfsp.checkpoint.stored_blocks import (
    parameters_of_an_expert,
    parameters_of_attentions,
    parameters_of_blocks,
)
from cfsp.cli.inspect import inspect_checkpoint
from cfsp.planning.candidate import Dropped
from cfsp.planning.importance import warn_of_experts
from cfsp.result.manifest import check_as_written
from cfsp.settings import Part
from family_contract import (
    Case,
    by_plan,
    check_in_memory_is_the_checkpoint,
    check_is_the_same,
    check_masked_is_cut,
    fresh_answer,
    logits_of,
    save_with_tokenizer,
)
from stock import generated
from tiny_decoders import tiny_config, tiny_model

_SLIDING, _FULL, _LINEAR = "sliding_attention", "full_attention", "linear_attention"


# What `prune` is asked of a model.
Asked = Callable[[PreTrainedModel], dict[str, Any]]


@dataclass(frozen=True)
class Removal:
    """A type with its config, what goes or how it is asked for, and what the config then says."""

    model_type: str
    config: dict[str, Any]
    goes: Dropped | Asked
    says: dict[str, Any] = field(default_factory=dict)


def half_of_experts(model: PreTrainedModel) -> dict[str, Any]:
    return {"parts": "experts", "sparsity": 0.5}


def fewer_groups(model: PreTrainedModel) -> dict[str, Any]:
    parts: tuple[Part, ...] = ("ffn", "kv")
    goal = goal_of_share(model, parts, 0.4)
    return {"parts": parts, "goal": goal, "multiple": 1, "repair": "none"}


GEMMA = {
    "num_hidden_layers": 7,
    "layer_types": [_SLIDING, _FULL, _SLIDING, _FULL, _SLIDING, _FULL, _SLIDING],
}
# Of attention layers: queries, keys and values in one matrix, and a bias of the
# output; two kinds of cache.
WITHOUT_ATTENTION = {
    "phi3": Removal("phi3", {"num_hidden_layers": 4}, Dropped((), (1, 3))),
    "gemma3_text and a block": Removal("gemma3_text", GEMMA, Dropped((2,), (0, 3))),
    "gpt2 and a block": Removal("gpt2", {"n_layer": 5}, Dropped((2,), (0, 3))),
}
# Of blocks: every way in which a config speaks of single ones.
WITHOUT_BLOCKS = {
    "blocks of gpt2": Removal("gpt2", {"n_layer": 4}, Dropped((1,)), {"n_layer": 3}),
    "blocks of smollm3": Removal(
        "smollm3",
        {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 1, 0]},
        Dropped((0, 2)),
        {"no_rope_layers": [0, 1, 0]},
    ),
    "blocks of deepseek_v3": Removal(
        "deepseek_v3",
        {"num_hidden_layers": 5, "first_k_dense_replace": 2},
        Dropped((1, 3)),
        {"num_hidden_layers": 3, "first_k_dense_replace": 1},
    ),
    "blocks of qwen2_moe": Removal(
        "qwen2_moe",
        {"num_hidden_layers": 5, "mlp_only_layers": [0, 3]},
        Dropped((1, 2)),
        {"mlp_only_layers": [0, 1]},
    ),
    "blocks of qwen3_next": Removal(
        "qwen3_next",
        {"num_hidden_layers": 4, "layer_types": [_LINEAR, _FULL, _LINEAR, _FULL]},
        Dropped((0, 3)),
        {"layer_types": [_FULL, _LINEAR]},
    ),
}
WITHOUT_EXPERTS = {
    "qwen2_moe": Removal("qwen2_moe", {}, half_of_experts, {"num_experts": 2}),
    "granitemoe": Removal("granitemoe", {}, half_of_experts, {"num_local_experts": 2}),
    "gpt_oss": Removal("gpt_oss", {}, half_of_experts, {"num_local_experts": 2}),
    "llama4_text": Removal("llama4_text", {}, half_of_experts, {"num_local_experts": 2}),
    # Groups of experts are chosen first: as many of each must stay.
    "deepseek_v3": Removal(
        "deepseek_v3",
        {"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        half_of_experts,
        {"n_routed_experts": 4},
    ),
}
# Biases, norms of queries and keys and after attention, queries, keys and values in one matrix, and
# as many heads of keys and values as of queries.
WITH_FEWER_GROUPS = {
    f"KV groups of {name}": Removal(name, {}, fewer_groups)
    for name in ("qwen2", "gemma3_text", "phi3", "gpt2")
}
LAYERS = {**WITHOUT_ATTENTION, **WITHOUT_BLOCKS}
WHOLE = {**LAYERS, **WITHOUT_EXPERTS}
REMOVALS = {**WHOLE, **WITH_FEWER_GROUPS}
# One of those that are stock checkpoints, as which they are looked at below.
IN_A_FRESH_PROCESS = [
    "phi3", "gemma3_text and a block", "gpt2 and a block", "deepseek_v3",
    "KV groups of gemma3_text", "KV groups of phi3",
]  # fmt: skip


@pytest.fixture(scope="module", params=REMOVALS)
def case(request, tokenizer, text_file, few, tmp_path_factory):
    place, removal = tmp_path_factory.mktemp("case"), REMOVALS[request.param]
    dense = tiny_model(removal.model_type, **removal.config)
    generator = torch.Generator().manual_seed(5)
    for name, buffer in dense.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))
    source, out = place / "dense", place / "out"
    save_with_tokenizer(dense, tokenizer, source)
    if isinstance(removal.goes, Dropped):
        parts = parts_of(removal.goes)
        plan = plan_without(Checkpoint(source, parts=parts), removal.goes)
        report = by_plan(source, plan, out, text_file)
    else:
        report = cfsp.prune(source, out=out, **removal.goes(dense), **few)
    return Case(dense, source, out, report, {"says": removal.says})


def test_what_is_masked_is_cut(case):
    check_masked_is_cut(case)


@pytest.mark.parametrize("case", WHOLE, indirect=True)
def test_as_much_is_gone_as_it_owned(case):
    plan = case.report.plan
    source, pruned = Checkpoint(case.source, parts=plan.parts), Checkpoint(case.out)
    gone = sum(parameters_of_blocks(source)[block] for block in plan.removed_blocks)
    if plan.removed_attentions:
        gone += sum(parameters_of_attentions(source)[block] for block in plan.removed_attentions)
    if plan.kept_experts is not None:
        of_one = parameters_of_an_expert(source)
        for unit in plan.units:
            gone += of_one.get(unit.block, 0) * (unit.ffns - len(unit.kept_ffns))
    assert case.report.parameters_before - case.report.parameters_after == gone
    staying = source.architecture.block_count - len(plan.removed_blocks)
    assert pruned.architecture.block_count == staying


@pytest.mark.parametrize("case", LAYERS | WITH_FEWER_GROUPS, indirect=True)
def test_caches_agree_with_none(case):
    model, tokens_BT = cfsp.load(case.out), case.tokens_BT
    expected = generated(model, tokens_BT, use_cache=False)
    assert torch.equal(generated(model, tokens_BT), expected)
    if not (case.removed_attentions or case.report.plan.of_part("kv")):
        return
    assert torch.equal(generated(model, tokens_BT, cache_implementation="static"), expected)
    for tokens_T, expected_T in zip(tokens_BT, expected, strict=True):
        assert torch.equal(generated(model, tokens_T[None])[0], expected_T)


def test_in_memory_is_the_checkpoint(case, tmp_path):
    assert cfsp.PruningPlan.load(case.out / PLAN_FILE) == case.report.plan
    check_in_memory_is_the_checkpoint(case, tmp_path)


@pytest.mark.parametrize("case", IN_A_FRESH_PROCESS, indirect=True)
def test_a_fresh_process_keeps_the_contract(case, forks, tmp_path):
    assert not case.question.failed
    answer = fresh_answer(case.question, forks, tmp_path)
    assert not answer.problems
    assert torch.equal(answer.tensors["logits"], logits_of(case.loaded, case.tokens_BT))


@pytest.mark.parametrize("case", WITHOUT_BLOCKS | WITHOUT_EXPERTS, indirect=True)
def test_without_blocks_or_experts_it_is_a_stock_checkpoint(case):
    config = read_json(case.out / "config.json")
    assert {key: config[key] for key in case.asked["says"]} == case.asked["says"]
    assert config["architectures"] == [type(case.dense).__name__]
    assert not {"auto_map", "per_layer_config", "ffn_widths"} & config.keys()
    assert not list(case.out.glob("*.py"))
    # A loader would make up what has another name.
    _, info = type(case.dense).from_pretrained(case.out, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("case", ["phi3", "gemma3_text and a block"], indirect=True)
def test_padding_on_the_left_changes_nothing(case):
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


@pytest.mark.parametrize("case", WITHOUT_ATTENTION, indirect=True)
def test_places_in_the_cache_are_filled_from_the_first_of_their_kind(case):
    model, plan = cfsp.load(case.out), case.report.plan
    architecture = Checkpoint(case.out).architecture
    blocks = blocks_of(model, architecture)
    gone = {plan.index_of_block(block) for block in plan.removed_attentions}
    (path,) = {unit.path for unit in architecture.gone}
    kinds = getattr(model.config, "layer_types", None) or [None] * len(blocks)
    filled: dict[object, list[int]] = {}
    for index, block in enumerate(blocks):
        attention: Any = block.get_submodule(path)
        assert (type(attention).__name__ == Gone.__name__) is (index in gone)
        if index not in gone:
            filled.setdefault(kinds[index], []).append(attention.layer_idx)
    for kind, places in filled.items():
        of_kind = [block for block in range(len(blocks)) if kinds[block] == kind]
        assert places == of_kind[: len(places)]
    assert set(filled) == set(kinds)


@pytest.mark.parametrize("case", ["phi3", "gemma3_text and a block"], indirect=True)
def test_the_plan_is_obeyed_and_commands_tell_of_it(case, tmp_path, command):
    plan, by_plan = case.report.plan, tmp_path / "by-plan"
    asked = ["--plan", case.out / PLAN_FILE, "--repair", "none", "--out", by_plan]
    command("prune", case.source, *asked)
    check_is_the_same(case.out, by_plan)
    told = json.loads(command("inspect", case.out, "--json").out)
    assert told["kv_groups"] == case.report.kv_groups["after"]
    assert told["kv_groups"].count(0) == 2
    assert told["pruned"]["removed_attentions"] == case.removed_attentions
    assert told["pruned"].get("removed_blocks", []) == list(plan.removed_blocks)
    lines = command("inspect", case.out).out.splitlines()
    said = next(line for line in lines if line.startswith("pruned "))
    removed = removed_in_words(plan.removed_blocks, plan.removed_attentions)
    assert removed in said
    assert "KV groups" in said and ("FFN" in said) is bool(plan.removed_blocks)
    assert removed in (case.out / "README.md").read_text()
    assert json.loads(command("verify", case.out, "--json").out)["verified"]


@pytest.mark.parametrize(
    "case", ["phi3", "gpt2 and a block", "gemma3_text and a block"], indirect=True
)
def test_blocks_make_up_for_what_went(case, text_file, tmp_path):
    plan = case.report.plan
    report = by_plan(case.source, plan, tmp_path / "out", text_file, "ridge")
    assert report.plan == plan
    (step,) = report.repair["steps"]
    assert step["name"] == "gaps"
    fitted = [block for block, entry in enumerate(step["blocks"]) if entry is not None]
    for entry in (step["blocks"][block] for block in fitted):
        assert entry["loss_after"] <= entry["loss_before"]
        assert entry["kept"] is (entry["loss_after"] < entry["loss_before"])
    beside = [block - 1 for block in plan.removed_blocks]
    assert fitted == sorted({*beside, *plan.removed_attentions})
    repaired = changed(case.out, tmp_path / "out")
    source = Checkpoint(case.source)
    assert repaired == {
        source.architecture.block_prefix(plan.index_of_block(unit.block)) + unit.down
        for unit in source.units
        if unit.block in fitted and step["blocks"][unit.block]["kept"]
    }
    assert repaired


# Experts.


@pytest.mark.parametrize("case", ["qwen2_moe", "deepseek_v3"], indirect=True)
def test_it_says_of_itself_what_went(case):
    plan = case.report.plan
    (kept,) = case.asked["says"].values()
    assert plan.kept_experts == kept
    manifest = read_json(case.out / "cfsp.json")
    assert manifest["experts"]["after"] == [kept] * len(plan.experts_of_blocks)
    lost = [unit.lost_output for unit in plan.units if unit.loses_experts]
    assert manifest["experts"]["lost_output"] == lost
    assert manifest["ffn_sparsity"] == pytest.approx(
        1 - sum(len(u.kept) * u.cost / u.ffns for u in plan.units)
        / sum(u.width * u.cost for u in plan.units)
    )  # fmt: skip
    assert check_as_written(Checkpoint(case.out)) > 3
    facts = inspect_checkpoint(Checkpoint(case.out))
    assert facts["experts"] == plan.kept_experts
    assert facts["pruned"]["experts"] == manifest["experts"]
    card = (case.out / "README.md").read_text()
    assert f"{manifest['experts']['before'][0] - kept} of the" in card


@pytest.mark.parametrize("case", ["qwen2_moe"], indirect=True)
def test_experts_that_are_not_redundant_are_told(case, caplog):
    plan = case.report.plan
    warn_of_experts(plan)
    assert "not redundant on this text: 2 of 4 experts of each block go (50.0%)" in caplog.text
    caplog.clear()
    units = tuple(replace(unit, lost_output=0.1) for unit in plan.units)
    warn_of_experts(replace(plan, units=units))
    assert "redundant" not in caplog.text


# Rhythms.


@pytest.mark.parametrize(
    ("model_type", "lists"),
    [("gemma2", "layer_types"), ("smollm3", "no_rope_layers"), ("llama", "")],
)
def test_blocks_that_alternate_otherwise_are_told(model_type, lists, caplog):
    config = tiny_config(model_type, num_hidden_layers=8)
    warn_of_rhythm(config, [6, 7], 8)
    assert not caplog.text
    warn_of_rhythm(config, [0, 7], 8)
    assert (lists in caplog.text) if lists else not caplog.text


# KV groups.


@pytest.mark.parametrize("case", WITH_FEWER_GROUPS, indirect=True)
def test_config_and_modules_say_the_numbers(case):
    groups = case.report.kv_groups["after"]
    assert len(set(groups)) > 1, "the case must have different numbers"
    fields = read_json(case.out / "config.json")
    assert [count for block in fields[KV_GROUPS].values() for count in block.values()] == groups
    assert Checkpoint(case.out).architecture.of_part("kv").widths == groups
    architecture = Checkpoint(case.source, parts=("kv",)).architecture
    for unit, count in zip(architecture.of_part("kv").units, groups, strict=True):
        block = blocks_of(case.loaded, architecture)[unit.block]
        for path, number, times in unit.attributes:
            assert getattr(block.get_submodule(path), number) == times * count
        for name, axis in unit.axes.items():
            assert axis.width(block.get_parameter(name).shape) == count


@pytest.mark.parametrize("case", ["KV groups of qwen2", "KV groups of gpt2"], indirect=True)
def test_repair_lowers_the_error(case, few, tmp_path):
    # Without sensitivity: that of a random model keeps its attention layers.
    asked = {**fewer_groups(case.dense), "multiple": 8, "repair": "sequential", **few}
    asked["block_metric"] = "angular"
    report = cfsp.prune(case.source, out=tmp_path / "out", **asked)
    ridge, *later = report.repair["steps"]
    of_attention = [entry for entry in ridge["blocks"] if "attn" in entry["path"]]
    assert len(of_attention) == len(case.report.kv_groups["before"])
    assert any(entry["error_after"] < entry["error_before"] for entry in of_attention)
    assert [step["name"] for step in later] == ["sequential"]
    logits_of(cfsp.load(tmp_path / "out"), case.tokens_BT)

"""Blocks or attention layers are asked for: beside channels, by statistics, and in vain."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ArceeConfig

import cfsp
from builders import (
    goal_of_share,
    job_of,
    never,
    parts_of,
    plan_without,
    raising,
    read_json,
    stopped_at,
)
from cfsp.architecture.proof import small_run_of
from cfsp.checkpoint.pruned_config import config_changes
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.cut.surgery import PrunedSource
from cfsp.decide import decide, plan_from
from cfsp.errors import BudgetError, UnsupportedModelError, UsageError
from cfsp.planning.candidate import Candidate, Dropped, DropSizes
from cfsp.planning.make import Planner
from cfsp.selection import drop_order
from cfsp.selection.constraint import Share
from cfsp.selection.drop_order import check_can_go
from cfsp.settings import Budget, Criterion, Part, PruneSettings
from cfsp.streaming import block_proof
from cfsp.streaming.block_proof import prove_without_blocks
from family_contract import by_plan, check_is_the_same
from stock import generated
from tiny_decoders import tiny_model

ATTENTION: tuple[Part, ...] = ("attention",)
BOTH: tuple[Part, ...] = ("attention", "blocks")


@pytest.fixture(scope="module")
def llama(save):
    return save(tiny_model("llama", num_hidden_layers=5))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *(("gemma3", "ffn"), ("gemma3_text", "kv"), ("mixtral", "experts")),
        *(("llama", "attention"), ("llama", "blocks")),
    ],
)
def test_nothing_removed_is_the_model(save, few, tmp_path, name, parts):
    source, out = save(tiny_model(name)), tmp_path / "out"
    cfsp.prune(source, out=out, parts=parts, sparsity=0.0, repair="none", **few)
    check_is_the_same(source, out)
    # A plan without other units than FFNs is of the first version.
    version = read_json(out / "cfsp_plan.json")["plan_version"]
    assert version == (1 if parts in ("ffn", "blocks", "experts") else 2)


# Beside channels.


def test_how_many_go_beside_channels_is_tried(llama, few, tmp_path):
    parts: tuple[Part, ...] = ("ffn", "blocks")
    goal = goal_of_share(llama, parts, 0.45)
    report = cfsp.prune(llama, out=tmp_path / "out", parts=parts, goal=goal, multiple=1, **few)
    plan = report.plan
    total = sum(parameters_of_blocks(Checkpoint(llama)))
    gone = report.parameters_before - report.parameters_after
    assert gone == pytest.approx(0.45 * total, rel=0.02)
    assert plan.has_gaps and 0 < plan.criterion["sparsity"] < 1
    assert len(plan.removed_blocks) + len(report.intermediate_sizes) == 5
    assert [not each.kept for each in plan.units] == [
        unit.block in plan.removed_blocks for unit in Checkpoint(llama).units
    ]


@pytest.mark.parametrize(("parts", "repair"), [(("ffn",), "ridge"), (("ffn", "kv"), "sequential")])
def test_channels_of_the_others_are_repaired(llama, few, text_file, tmp_path, parts, repair):
    """Also where somebody's plan drops a block and an attention layer."""
    source = Checkpoint(llama, parts=("ffn", "kv"))
    statistics = cfsp.calibrate(llama, parts="ffn,kv", **few)
    planner = Planner.of(source, statistics, Budget(parts=parts, multiple=1), Criterion())
    plan = planner.plan(Candidate(Dropped((1,), (3,)), 0, parts, 0.3))
    report = by_plan(llama, plan, tmp_path / "out", text_file, repair)
    ridge, *later = report.repair["steps"]
    assert ridge["name"] == "ridge"
    expected = ["gaps" if repair == "ridge" else "sequential"]
    assert [step["name"] for step in later] == expected
    # What goes whole is not among what was repaired.
    assert [entry is None for entry in ridge["blocks"]] == [not unit.kept for unit in plan.units]
    check_cached(cfsp.load(tmp_path / "out"))


def test_what_lost_attentions_and_kv_groups_is_pruned_again(llama, few, tmp_path):
    """Each time only what is asked for goes; the rest stays as it is."""
    asked = {"repair": "none", "sparsity": 0.3, **few}
    groups = cfsp.prune(llama, out=tmp_path / "0", parts="kv", **asked).kv_groups["after"]
    assert len(set(groups)) > 1
    first = cfsp.prune(tmp_path / "0", out=tmp_path / "1", multiple=8, **asked)
    assert first.kv_groups["after"] == groups and first.ffn_sparsity > 0.2
    second = cfsp.prune(tmp_path / "1", out=tmp_path / "2", parts="attention", **asked)
    third = cfsp.prune(tmp_path / "2", out=tmp_path / "3", parts="attention", **asked)
    found = Checkpoint(tmp_path / "3").architecture
    gone = (*second.plan.removed_attentions, *third.plan.removed_attentions)
    assert sorted(unit.block for unit in found.gone) == sorted(gone) and len(gone) > 1
    assert found.of_part("ffn").widths == first.intermediate_sizes
    last = cfsp.prune(tmp_path / "3", out=tmp_path / "4", parts="blocks", **asked)
    assert Checkpoint(tmp_path / "4").architecture.block_count == 5 - len(last.plan.removed_blocks)
    check_cached(cfsp.load(tmp_path / "4"))


def check_cached(model: Any) -> None:
    tokens_BT = torch.arange(2, 26).view(2, 12)
    assert torch.equal(generated(model, tokens_BT), generated(model, tokens_BT, use_cache=False))


# By statistics.


def test_attention_layers_go_by_order_and_by_distances(llama, few):
    statistics = cfsp.calibrate(llama, parts="attention", **few)
    order = [each.block for each in statistics.removals_of("attention")]
    assert len(order) == 3 and not statistics.removals_of("blocks")  # half of five
    distance_L = statistics.of_part("kv").distance_L
    nearest = sorted(range(5), key=distance_L.__getitem__)
    for removal, known, expected in (
        ("divergence", statistics, order[:2]),
        ("runs", replace(statistics, removals=()), nearest[:2]),
    ):
        plan = cfsp.plan(llama, known, sparsity=0.4, parts="attention")
        assert plan.removed_attentions == tuple(sorted(expected))
        assert plan.criterion["removal"] == removal
        assert all(unit.kept_width == unit.width for unit in plan.of_part("ffn"))


@pytest.mark.parametrize("part", ["attention", "blocks"])
def test_as_much_goes_as_comes_closest(llama, few, part):
    parts: tuple[Part, ...] = (part,)
    source = Checkpoint(llama, parts=parts)
    statistics = cfsp.calibrate(llama, parts=part, **few)
    sizes = DropSizes.of(source, part)
    for share in (0.05, 0.3, 0.51):
        settings = PruneSettings(Budget(parts=parts), goal=goal_of_share(llama, parts, share))
        plan = plan_from(source, statistics, settings)
        gone = plan.removed_blocks or plan.removed_attentions
        missing = abs(sizes.parameters(gone) - share * sizes.total)
        assert missing <= max(sizes.size_of.values()) / 2
        assert plan.criterion["of"] == part
    # What was measured up to half of them is the plan for half of them.
    assert sorted(each.block for each in statistics.removals) == list(gone)


def test_how_many_go_beside_channels_takes_a_text(llama, few):
    asked = PruneSettings(Budget(parts=("ffn", "blocks")), goal=cfsp.TargetParameters(0.8))
    statistics = cfsp.calibrate(llama, parts="ffn,blocks", **few)
    with pytest.raises(UsageError, match="should go, which requires the model and a text"):
        plan_from(Checkpoint(llama), statistics, asked)


def test_a_killed_run_goes_on_with_what_it_had_chosen(llama, few, tmp_path, monkeypatch):
    asked = {"parts": "attention", "goal": goal_of_share(llama, ATTENTION, 0.3), **few}
    stopped_at("cfsp.decide.select", cfsp.prune, llama, out=tmp_path / "out", **asked)
    expected = cfsp.prune(llama, out=tmp_path / "at-once", **asked)
    monkeypatch.setattr(drop_order, "order_of_removal", never)
    assert cfsp.prune(llama, out=tmp_path / "out", **asked).plan == expected.plan


# Refusals.


def test_impossible_budgets_say_what_is_possible(llama, monkeypatch):
    def check(parts: tuple[Part, ...], goal: Any = None, **asked: Any) -> None:
        settings = PruneSettings(Budget(parts=parts, **asked), goal=goal)
        decide(job_of(Checkpoint(llama, parts=parts), settings))

    with pytest.raises(BudgetError, match="at least one of 5 attention layers must stay; between"):
        check(ATTENTION, sparsity=0.95)
    with pytest.raises(BudgetError, match="cannot remove 5 attention layers"):
        check(ATTENTION, remove=5)
    with pytest.raises(BudgetError, match=r"at least one of 5 blocks must stay; between 0 and"):
        check(("blocks",), cfsp.TargetParameters(0.25))
    monkeypatch.setattr("cfsp.job.fits", lambda *args: False)
    with pytest.raises(UsageError, match="requires the whole model in memory"):
        check(("ffn", "blocks"), cfsp.TargetParameters(0.8))


GEMMA3N: dict[str, Any] = {"num_kv_shared_layers": 0}
SPARSE: dict[str, Any] = {"num_hidden_layers": 4, "decoder_sparse_step": 2}
SCALED: dict[str, Any] = {"n_head": 2, "scale_attn_by_inverse_layer_idx": True}
# transformers 5.25 asks for the sizes of a mask before the length of what a cache holds.
ASKED = "mask_sizes" if Version(transformers.__version__) >= Version("5.25") else "seq_len"
NO_CACHE = f"block 2 .* failed the check cache: .*get_{ASKED}"


@pytest.mark.parametrize(
    ("name", "changes", "goes", "message"),
    [
        ("llama", {}, Dropped((), (0, 1, 2)), "blocks 0 to 2 of .* can't be .*: at least one must"),
        ("gemma3_text", {}, Dropped((), (2,)), "block 2 .*: at least one of the kind full_attenti"),
        ("qwen3_next", {}, Dropped((), (0,)), "expected one attention in block 0 whose heads are"),
        # Blocks that read the keys and values of others.
        ("gemma3n_text", {}, Dropped((), (0,)), "block 0 .* failed the check cut: .* KeyError"),
        ("gemma3n_text", GEMMA3N, Dropped((0,)), "embed_tokens_per_layer.weight has a part for ev"),
        ("qwen2_moe", SPARSE, Dropped((1,)), r"block 1 of .*: block 2 would have .* for mlp\."),
        # Its blocks put lists together, of which what stands for an attention is none.
        ("openai-gpt", {}, Dropped((), (1,)), "failed the check zeros: .* TypeError"),
        # Without a block of attention its class has no cache.
        ("granitemoehybrid", {}, Dropped((2,)), NO_CACHE),
        # It goes on with one token only.
        ("jamba", {}, Dropped((2,)), NO_CACHE),
        ("qwen3_vl", {}, Dropped((1,)), "features of images are added after blocks up to 1, by"),
        ("gpt2", SCALED, Dropped((0,)), r"block 1 would have 0\.25 for attn.scaling, it has 0.125"),
    ],
)
def test_what_the_model_cannot_do_without_is_refused_by_name(name, changes, goes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        check_can_go(LoadedModel(tiny_model(name, **changes), parts_of(goes)), goes)


def test_one_of_a_kind_must_stay_beside_blocks():
    kinds = ["full_attention" if block % 2 else "sliding_attention" for block in range(7)]
    source = LoadedModel(tiny_model("gemma3_text", num_hidden_layers=7, layer_types=kinds), BOTH)
    with pytest.raises(UnsupportedModelError, match=r"of block 1 .* beside blocks 3, 5: at least"):
        check_can_go(source, Dropped((3, 5), (1,)))
    check_can_go(source, Dropped((0, 5), (1,)))


def test_one_of_a_kind_must_stay_beside_those_that_went_before(save, few, tmp_path):
    """Without it no cache would know how long the text is: two turns went wrong."""
    source, out = save(tiny_model("gemma3_text")), tmp_path / "out"
    cfsp.prune(source, out=out, parts="attention", remove=1, keep="1,2", repair="none", **few)
    pruned = Checkpoint(out, parts=("blocks",))
    message = r"block 1 of .* beside the attention layers that are gone: at least one of the kind s"
    with pytest.raises(UnsupportedModelError, match=message):
        check_can_go(pruned, Dropped((1,)))
    check_can_go(pruned, Dropped((0,)))


@pytest.mark.parametrize("name", ["bloom", "mpt", "gemma3n_text"])
def test_what_stock_would_load_with_random_attentions_is_refused_before_any_text(name):
    source = LoadedModel(tiny_model(name), ATTENTION)
    with pytest.raises(UnsupportedModelError, match=r"can't go alone: .*channels first"):
        Share(source, Budget(parts=ATTENTION, remove=1)).check()
    Share(source, Budget(parts=ATTENTION, remove=0)).check()
    with pytest.raises(UnsupportedModelError, match="can't go alone"):
        PrunedSource(source, plan_without(source, Dropped((), (1,))))
    # Beside channels the stock class fails, as it must.
    halves = [unit.width // (2 if unit.part == "ffn" else 1) for unit in source.units]
    halves[next(i for i, unit in enumerate(source.units) if unit.part == "kv")] = 0
    config_changes(source.config, source.architecture, halves)


def test_attentions_can_go_whatever_their_heads_are():
    # One KV group, beside the FFN, latent, with norms over all heads together, and before an
    # attention to an encoder that never runs.
    for name in ("gpt_bigcode", "gptj", "deepseek_v3", "olmo2", "trocr"):
        check_can_go(LoadedModel(tiny_model(name), ATTENTION), Dropped((), (0, 1)))


def test_the_small_model_of_the_proof_need_not_have_a_valid_config():
    config = ArceeConfig(num_hidden_layers=3)
    # Its class checks this when it reads a config.
    with pytest.raises(ValueError, match="is not a multiple of the number of attention heads"):
        small_run_of(config).model.config.validate_architecture()
    prove_without_blocks(config, (1,))


def test_blocks_stay_of_which_the_others_need_more_than_a_hidden_state(monkeypatch):
    refused = UnsupportedModelError("argument x of block 2 is made from hidden states")
    monkeypatch.setattr(block_proof, "find_call_form", raising(refused))
    message = r"block 1 of Llama.* failed the check skipped: .* a hidden state, found that argument"
    with pytest.raises(UnsupportedModelError, match=message):
        prove_without_blocks(tiny_model("llama").config, (1,))

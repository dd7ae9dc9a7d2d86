"""Goals: what is asked for is one thing, in its range, said before any work, and met."""

import logging
import re
from dataclasses import replace
from operator import mul
from pathlib import Path

import pytest
import torch

import cfsp
from builders import draw_windows, never
from cfsp import pruning_cost as cost
from cfsp.checkpoint.own_files import STATISTICS_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import UsageError
from cfsp.selection import goal as goals
from cfsp.selection.constraint import STEPS
from cfsp.settings import Budget, CalibrationText, PruneSettings, TargetKVCache, TargetParameters
from tiny_decoders import tiny_model
from tiny_models import BLOCKS, WIDTH, build_tiny_model


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("", "exactly one of --sparsity"),
        ("--sparsity 0.5 --target-params 0.5", "--sparsity and --target-params"),
        ("--target-speedup 1.2 --max-loss-increase 1", "found --target-speedup and"),
        # Of parts that were never compared with a real model it is not predicted.
        ("--target-speedup 1.2 --parts kv", "give --target-params, then time the result with"),
        (
            "--parts ffn,kv --sparsity 0.2",
            "several share one target, --target-params or --max-loss",
        ),
        ("--parts blocks --remove 1 --sparsity 0.2", "found --sparsity and --remove"),
        ("--parts ffn,blocks --remove 1", "belongs to one of --parts attention"),
        ("--remove 1", "one of --parts attention, blocks, experts alone"),
        ("--parts experts --remove -1", "must be at least 0"),
        ("--parts ffn,experts --target-params 0.8", "whole experts go alone"),
        (
            "--parts kv,attention --target-kv-cache 0.5",
            "whole attention layers go alone, found --parts kv,attention: give --parts attention, "
            "then prune the result again",
        ),
        ("--sparsity 0.5 --target-speedup-of decode", "belongs to --target-speedup"),
        ("--target-params 0", "--target-params must be above 0 and at most 1, found 0.0"),
        ("--target-params nan", "--target-params must be above 0"),
        ("--target-speedup 1", "--target-speedup must be above 1"),
        ("--max-loss-increase -1", "--max-loss-increase must be above 0"),
        ("--target-params 0.01", "cannot remove 99.0% of the model's parameters"),
        ("--max-loss-increase 1 --statistics s", "--statistics exclude each other"),
        ("--plan p.json --target-params 0.5", "--plan and --target-params exclude"),
        ("--sparsity 0.5 --effort fast --repair ridge", "--effort fast is --repair none"),
        (
            "--target-kv-cache 0.2",
            "--target-kv-cache must be at least 0.5, found 0.2; whole attention layers go",
        ),
        # No layer may go.
        ("--target-kv-cache 0.2 --keep *.self_attn", "must be at least 1, found 0.2\n"),
        (
            "--target-kv-cache 0.5 --parts blocks",
            "removes KV groups (the default) or whole attention layers",
        ),
        (
            "--parts kv --keep model.layers.*.self_attn --max-loss-increase 0.5",
            "nothing can be removed: with at least one KV group in every attention "
            "and all that --ke",
        ),
    ],
)
def test_impossible_goals_are_one_sentence_before_any_pass(prune, asked, message, monkeypatch):
    monkeypatch.setattr("cfsp.decide.calibrate", never)
    error = prune(*asked.split(), status=2).error
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_a_plan_may_have_a_goal(model, pruned, text_file):
    statistics = cfsp.Statistics.load(pruned / STATISTICS_FILE)
    by_name = cfsp.plan(model, statistics, target_params=0.8, multiple=8)
    assert by_name == cfsp.plan(model, statistics, goal=TargetParameters(0.8), multiple=8)
    assert 0.2 < by_name.ffn_sparsity < 1
    equal = cfsp.plan(model, statistics, sparsity=0.5, widths="equal")
    assert equal.criterion["block_metric"] == "uniform"
    with pytest.raises(UsageError, match="unknown argument max_loss_increase"):
        cfsp.plan(model, statistics, max_loss_increase=0.1)
    # Where `prune` would try blocks, too, on a text.
    assert not cfsp.plan(model, statistics, target_params=0.7, multiple=8).removed_blocks
    of_groups = cfsp.calibrate(model, data=[text_file], samples=4, seqlen=32, parts="kv")
    assert cfsp.plan(model, of_groups, target_kv_cache=0.5).sparsity_of("kv") == 0.5


# What is said before any work.


def settings(samples: int = 64, sparsity: float = 0.5) -> PruneSettings:
    text = CalibrationText(names=("mixed",), samples=samples)
    return PruneSettings(text=text, budget=Budget(sparsity=sparsity))


def test_a_goal_says_its_size_or_nothing(source, caplog):
    goal = replace(settings(sparsity=0), goal=TargetParameters(0.75))
    size = cost.size_after(source, goal)
    assert size is not None
    caplog.set_level(logging.INFO)
    cost.announce(source, goal)
    assert "(-25.0%)" in caplog.text
    caplog.clear()
    cache = replace(settings(sparsity=0), goal=TargetKVCache(0.5))
    assert cost.size_after(source, cache) is None
    cost.announce(source, cache)
    assert "parameters ->" not in caplog.text


def test_the_size_of_whole_layers_is_said(model):
    source = Checkpoint(model, parts=("attention",))
    first, second, third = (
        cost.size_after(source, replace(settings(sparsity=0), budget=Budget(**asked)))
        for asked in (
            {"parts": ("attention",), "remove": 1},
            {"parts": ("attention",), "sparsity": 1 / BLOCKS},
            {"parts": ("attention",), "sparsity": 0.4},
        )
    )
    assert first == second == third is not None and first[0] < source.parameter_count


def test_doubts(source, monkeypatch):
    """Each has its own reason; a large model with enough text gives none."""
    small = "has little to spare"
    assert [small in each for each in cost.doubts(source, settings())] == [True]
    monkeypatch.setattr(cost, "_SMALL", 0)
    assert not list(cost.doubts(source, settings()))
    for few in (cost.doubts(source, settings(samples=63)), cost.doubts(source, settings(), 63)):
        assert next(few).startswith("63 windows")
    experts = replace(settings(samples=63), budget=Budget(0.5, parts=("experts",)))
    assert not list(cost.doubts(source, experts))  # nothing is repaired
    monkeypatch.setattr(cost, "_LITTLE", 1.0)  # as if most were in the vocabulary
    (little,) = cost.doubts(source, settings())
    assert "quantise it" in little


def test_a_short_text_is_doubted_by_what_it_gave(model, tmp_path, caplog):
    text = tmp_path / "short.txt"
    text.write_text("some words " * 200)
    cfsp.prune(model, out=tmp_path / "out", sparsity=0.3, data=text, seqlen=64)
    assert re.search(r"^\d{1,2} windows calibrate and repair, by default 128", caplog.messages[-1])


# A fraction of the KV cache stays.


ONE_GROUP, FOUR_GROUPS = {"num_key_value_heads": 1}, {"num_key_value_heads": 4}
HEADS = {"num_attention_heads_per_layer": [4, 8, 16], **FOUR_GROUPS}
LARGE_HEADS = {"global_head_dim": 32, "sliding_window": 256, **FOUR_GROUPS}
# Every other block sees no further than 8 tokens back, and caches no more than them.
SLIDING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize(
    ("name", "changes", "more", "fraction", "of_group", "most_too_few"),
    [
        # KV groups are the default.
        ("llama", {}, "", 0.5, (1, 1, 1), 1),
        ("llama", {}, "--parts attention", 0.7, (1, 1, 1), 2),
        # Two of four groups are nearer to it than one.
        ("llama", FOUR_GROUPS, "--widths equal", 0.4, (1, 1, 1), 3),
        # A group owns one, two or four heads of queries.
        ("laguna", HEADS, "", 0.5, (1, 1, 1), 3),
        ("laguna", HEADS, "", 0.25, (1, 1, 1), 3),
        # The last block of this Gemma 4 has heads twice as large.
        ("gemma4_text", LARGE_HEADS, "", 0.5, (1, 1, 2), 1),
        ("gemma3_text", SLIDING, "", 0.77, (8, 256, 8, 256), 391),
    ],
)
def test_a_fraction_of_the_cache_stays(
    prune, save, name, changes, more, fraction, of_group, most_too_few
):
    model = save(tiny_model(name, **changes))
    done = prune("--target-kv-cache", fraction, *more.split(), "--effort", "fast", of=model)
    before, after = (
        sum(map(mul, done.manifest["kv_groups"][when], of_group)) for when in ("before", "after")
    )
    assert after <= fraction * before < after + most_too_few
    assert more != "--parts attention" or {*done.manifest["kv_groups"]["after"]} == {0, 2}
    assert done.manifest["goal"]["goal"] == "target_kv_cache"
    assert done.manifest["ffn_sparsity"] == 0.0
    length = " of 256 tokens" if changes == SLIDING else ""
    assert f"at most {fraction} of the KV cache{length}" in done.card


def test_attention_layers_that_cache_unequally_are_not_counted(prune, sliding):
    said = prune("--target-kv-cache", 0.7, "--parts", "attention", of=sliding, status=2).error
    assert "give --parts kv, found --parts attention" in said


@pytest.fixture(scope="module")
def sliding(save) -> Path:
    return save(tiny_model("gemma3_text", **SLIDING))


def test_blocks_that_stay_whole_take_part_in_a_fraction_of_the_cache(prune, sliding):
    kept = ("--keep", "0,1", "--effort", "fast")
    said = prune("--target-kv-cache", 0.7, *kept, of=sliding, status=2).error
    assert "and what --keep names stays, so --target-kv-cache must be at least 0.75" in said
    done = prune("--target-kv-cache", 0.77, *kept, of=sliding)
    assert done.manifest["kv_groups"]["after"] in ([2, 2, 1, 1], [2, 2, 2, 1])


def test_the_smallest_fraction_of_the_cache_that_is_named_can_be_met(prune, save):
    model = save(tiny_model("llama", num_hidden_layers=4))
    asked = ("--effort", "fast", "--target-kv-cache")
    said = prune(*asked, 0.01, of=model, status=2).error
    assert "each of the 4 attention layers keeps one of its KV groups" in said
    assert "found 0.01; whole attention layers go with --parts attention" in said
    least = re.search(r"must be at least ([\d.]+), found 0.01", said)
    assert least, said
    done = prune(*asked, least[1], of=model)
    before, after = (sum(done.manifest["kv_groups"][when]) for when in ("before", "after"))
    assert after == float(least[1]) * before


# As much goes as keeps the loss within a bound.


@pytest.fixture(scope="module")
def trained(tokenizer, text_file, save) -> Path:
    """A tiny model that has learnt something: of a random one the loss may fall by pruning."""
    windows = draw_windows([str(text_file)], tokenizer, samples=64, seqlen=32, seed=9)
    network = build_tiny_model("llama").train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(60):
        batch_BT = windows.tokens_NT[step % 4 :: 4]
        network(batch_BT, labels=batch_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return save(network)


@pytest.fixture
def few_held_out(monkeypatch) -> None:
    monkeypatch.setattr(goals, "HELD_OUT_WINDOWS", 4)


@pytest.mark.usefixtures("few_held_out")
def test_as_much_goes_as_fits_and_what_was_tried_is_told(trained, tmp_path, prune, command):
    done = prune("--max-loss-increase", 0.2, "--repair", "none", of=trained)
    found = done.manifest["goal"]
    fitting = [entry["sparsity"] for entry in found["tried"] if entry["fits"]]
    others = [entry["sparsity"] for entry in found["tried"] if not entry["fits"]]
    chosen = found["chosen"]["sparsity"]
    assert 0 < chosen == max(fitting) == pytest.approx(min(others) - 1 / STEPS)
    assert all((entry["value"] <= 0.2) == entry["fits"] for entry in found["tried"])
    # What was tried with masked channels is what came out.
    (tried,) = [entry for entry in found["tried"] if entry["sparsity"] == chosen]
    parameters = done.manifest["parameters_after"]
    assert found["result"] == pytest.approx(tried["value"], abs=1e-4)
    assert tried["parameters"] == parameters
    assert done.manifest["ffn_sparsity"] == pytest.approx(chosen, abs=8 / WIDTH / BLOCKS)
    assert "sparsity  parameters  loss increase  fits" in done.said
    assert "at most 0.2 nats per token over" in done.said and "(the result: " in done.said
    assert f"| {chosen:.1%} | {parameters / 1000:.1f}k |" in done.card
    page = tmp_path / "report.html"
    command("report", done.out, "--out", page)
    assert f"--max-loss-increase 0.2, {len(found['tried'])} plans tried" in page.read_text()


@pytest.mark.usefixtures("few_held_out")
def test_a_bound_that_nothing_keeps(prune, monkeypatch):
    measured = lambda model, windows, label: 5.0 + 45 * (label != "dense")  # noqa: E731
    monkeypatch.setattr(goals, "loss_in_memory", measured)
    error = prune("--max-loss-increase", 0.1, status=2).error
    assert "cannot stay within 0.1 nats" in error
    assert "already 0.5% of the FFN channels cost 4" in error


def test_statistics_of_other_parts_serve_by_what_they_know(model, few):
    """Sensitivity of FFNs alone was measured."""
    statistics = cfsp.calibrate(model, parts=("ffn", "kv"), **few)
    assert statistics.sensitivity is not None and statistics.sensitivity.other_parts
    of_ffns = replace(statistics.sensitivity, other_parts={})
    statistics = replace(statistics, sensitivity=of_ffns)
    for parts, metric in (("kv", "angular"), ("ffn", "sensitivity")):
        plan = cfsp.plan(model, statistics, sparsity=0.5, parts=parts)
        assert plan.criterion["block_metric"] == metric


@pytest.mark.usefixtures("few_held_out")
def test_a_loss_is_bounded_for_experts_and_before_repair(tiny_checkpoint, prune):
    done = prune("--max-loss-increase", 0.5, of=tiny_checkpoint("mixtral"))
    goal = done.manifest["goal"]
    fitting = [entry["sparsity"] for entry in goal["tried"] if entry["fits"]]
    assert max(fitting) == goal["chosen"]["sparsity"] > 0
    assert goal["result"] < 0.5
    assert "repaired by ridge (error of outputs" in done.said

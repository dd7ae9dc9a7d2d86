"""Goals other than a fraction: the search, left-over windows, each from command to manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cfsp.goals import latency, loss, resolve, speedup
from cfsp.goals.latency import (
    WORKLOAD,
    Curve,
    Latencies,
    measure_latencies,
    models_to_time,
    widths_to_measure,
)
from cfsp.goals.resolve import resolve_goal
from cfsp.goals.search import STEPS, highest_step, last_that_holds
from cfsp.planning.removal_budget import RemovedWhole
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import cfsp
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.skeleton import empty_model
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.cli import main
from cfsp.engine.compute import Engine
from cfsp.engine.workplace import Workplace
from cfsp.errors import BudgetError, ResumeError, TextError, UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.planning.widths import NOTHING, model_size
from cfsp.result.manifest import read_manifest
from cfsp.result.prune_report import PruneReport
from cfsp.settings import (
    PHASES,
    Budget,
    MaxLossIncrease,
    Part,
    PruneSettings,
    TargetParameters,
    TargetSpeedup,
)
from cfsp.settings.budget import parse_parts
from cfsp.speed.work import work_of
from cfsp.text.drawing import draw_left_over, draw_windows
from tiny_models import BLOCKS, TINY_CONFIGS, WIDTH, build_tiny_model

# Half of the width saves a quarter of the time, all of it four tenths.
FFN = Curve((8, 48, 96), (0.6, 0.75, 1.0))
# A group of two saves a tenth, an attention three tenths; all blocks 95 hundredths.
LATENCIES = Latencies(
    {
        "ffn": FFN,
        "kv": Curve((0, 1, 2), (0.7, 0.9, 1.0)),
        "blocks": Curve((0, BLOCKS), (0.05, 1.0)),
    },
    {"disturbance": 0.0},
)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def statistics(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "stats.safetensors"
    cfsp.calibrate(model, data=[text_file], samples=8, seqlen=32).save(path)
    return path


@pytest.fixture(scope="module")
def trained(tokenizer: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learnt something: of a random one the loss may fall by pruning."""
    windows = draw_windows([str(text_file)], tokenizer, samples=64, seqlen=32, seed=9)
    network = build_tiny_model("llama").train()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for step in range(60):
        batch_BT = windows.tokens_NT[step % 4 :: 4]
        network(batch_BT, labels=batch_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("trained")
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def prune(model: Path, text: Path, out: Path, *more: object) -> int:
    return main(
        ["prune", str(model), "--data", str(text), "--samples", "8", "--seqlen", "32",
         "--multiple", "8", "--out", str(out), *map(str, more)]
    )  # fmt: skip


# Search.


@given(st.integers(1, 300), st.integers(0, 300))
def test_bisection_finds_the_last_step(highest: int, last: int) -> None:
    asked = []

    def holds(step: int) -> bool:
        asked.append(step)
        return step <= last

    assert last_that_holds(highest, holds) == min(last, highest)
    assert 0 not in asked
    assert len(asked) == len(set(asked)) <= highest.bit_length() + 1


def test_highest_step_leaves_a_multiple(model: Path) -> None:
    size = model_size(open_checkpoint(model))
    assert highest_step(size, Budget(multiple=24)) == STEPS * 3 // 4
    with pytest.raises(BudgetError, match="choose a smaller --multiple"):
        highest_step(size, Budget(multiple=WIDTH))


# Windows to measure on.


def test_left_over_windows_are_those_that_calibration_does_not_see(
    tokenizer: Any, text_file: Path, other_text_file: Path
) -> None:
    names = [str(text_file), str(other_text_file)]
    drawn = draw_windows(names, tokenizer, samples=9, seqlen=16, seed=3)
    left = draw_left_over(names, tokenizer, samples=9, seqlen=16, seed=3, count=7)
    assert left.sources == {names[0]: 4, names[1]: 3}
    seen = {tuple(window) for window in drawn.tokens_NT.tolist()}
    assert not seen & {tuple(window) for window in left.tokens_NT.tolist()}
    again = draw_left_over(names, tokenizer, samples=9, seqlen=16, seed=3, count=7)
    assert torch.equal(left.tokens_NT, again.tokens_NT)


def test_texts_that_have_no_windows_left(tokenizer: Any, text_file: Path) -> None:
    name = str(text_file)
    have = len(draw_windows([name], tokenizer, samples=None, seqlen=512).tokens_NT)
    with pytest.raises(TextError, match=rf"calibration takes {have}; 2 others.*--held-out"):
        draw_left_over([name], tokenizer, samples=None, seqlen=512, seed=0, count=2)


def test_windows_left_of_a_text_that_is_named_twice(tokenizer: Any, text_file: Path) -> None:
    names = [str(text_file)] * 2
    drawn = draw_windows(names, tokenizer, samples=4, seqlen=16, seed=0)
    left = draw_left_over(names, tokenizer, samples=4, seqlen=16, seed=0, count=3)
    both = [tuple(row) for row in [*drawn.tokens_NT.tolist(), *left.tokens_NT.tolist()]]
    assert len(set(both)) == 7 and left.sources == {names[0]: 3}


# --target-params.


@pytest.mark.parametrize("repair", ["none", "ridge"])
def test_target_params(model: Path, text_file: Path, tmp_path: Path, repair: str) -> None:
    out = tmp_path / "out"
    assert (
        prune(model, text_file, out, "--target-params", 0.75, "--parts", "ffn", "--repair", repair)
        == 0
    )
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = manifest["parameters_before"], manifest["parameters_after"]
    multiple = 8 * 3 * 32
    assert abs(after - 0.75 * before) <= multiple
    assert manifest["goal"]["goal"] == "target_params"
    assert manifest["goal"]["asked"] == 0.75
    budget = {"sparsity": 0.25, "of": "model", "multiple": 8, "widths": "importance"}
    whole = {"remove_blocks": None, "remove_attentions": None, "remove_experts": None}
    assert manifest["goal"]["budget"] == {**budget, "parts": ["ffn"], **whole}
    assert "keep 0.75 of all parameters" in (out / "README.md").read_text()


def test_target_kv_cache(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert prune(model, text_file, out, "--target-kv-cache", 0.5, "--effort", "fast") == 0
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = manifest["kv_groups"]["before"], manifest["kv_groups"]["after"]
    assert sum(after) <= 0.5 * sum(before) < sum(after) + 1
    assert manifest["goal"]["goal"] == "target_kv_cache"
    assert manifest["ffn_sparsity"] == 0.0
    assert "keep 0.5 of the KV cache" in (out / "README.md").read_text()


def test_a_kv_cache_that_cannot_be_is_refused(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert prune(model, text_file, out, "--target-kv-cache", 0.2) == 2
    assert "--target-kv-cache must be at least 0.5, found 0.2" in capsys.readouterr().err
    assert prune(model, text_file, out, "--target-kv-cache", 0.5, "--parts", "ffn") == 0
    assert prune(model, text_file, out, "--target-kv-cache", 0.5, "--parts", "blocks") == 2
    assert "removes KV groups (the default), whole attentions" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sliding(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which every other block sees no further than 8 tokens back."""
    directory = tmp_path_factory.mktemp("sliding")
    config = TINY_CONFIGS["gemma3_text"]()
    config.num_hidden_layers, kinds = 4, ["sliding_attention", "full_attention"]
    config.layer_types = kinds * 2
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("parts", ["kv", "kv,attention"])
def test_a_sliding_window_caches_no_more_than_its_tokens(
    sliding: Path, text_file: Path, tmp_path: Path, parts: str
) -> None:
    out = tmp_path / "out"
    options = ["--target-kv-cache", 0.77, "--parts", parts, "--effort", "fast"]
    assert prune(sliding, text_file, out, *options) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = (
        sum(n * each for n, each in zip(groups, (8, 256, 8, 256), strict=True))
        for groups in (manifest["kv_groups"]["before"], manifest["kv_groups"]["after"])
    )
    assert before == 1056 and 0.4 * before < after <= 0.77 * before
    assert "to keep 0.77 of the KV cache of 256 tokens" in (out / "README.md").read_text()


def test_attentions_that_cache_unequally_are_not_counted(
    sliding: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--target-kv-cache", 0.7, "--parts", "attention")
    assert prune(sliding, text_file, out, *options) == 2
    assert "give --parts kv,attention, found --parts attention" in capsys.readouterr().err


@pytest.mark.parametrize(("parts", "fraction"), [("attention", 0.7), ("kv,attention", 0.5)])
def test_a_kv_cache_without_some_attentions(
    model: Path, text_file: Path, tmp_path: Path, parts: str, fraction: float
) -> None:
    out = tmp_path / "out"
    options = ["--target-kv-cache", fraction, "--parts", parts]
    assert prune(model, text_file, out, *options) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    before, after = manifest["kv_groups"]["before"], manifest["kv_groups"]["after"]
    assert sum(after) <= fraction * sum(before) < sum(after) + (2 if parts == "attention" else 1)
    assert manifest["ffn_sparsity"] == 0.0
    if parts == "attention":
        assert {*after} == {0, 2}


def test_target_params_in_equal_widths(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--target-params", 0.75, "--widths", "equal")
    assert prune(model, text_file, out, *options) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    assert len(set(manifest["intermediate_sizes"])) == 1
    assert manifest["goal"]["budget"]["widths"] == "equal"
    assert manifest["criterion"]["block_metric"] == "uniform"
    # A stock config says it: no code, no flag.
    assert not list(out.glob("*.py"))
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_target_params_of_a_plan_is_one_minus_the_sparsity_of_the_model(
    model: Path, statistics: Path, tmp_path: Path
) -> None:
    common = ["plan", str(model), "--statistics", str(statistics), "--multiple", "8"]
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    assert main([*common, "--target-params", "0.7", "--out", str(first)]) == 0
    assert main([*common, "--sparsity", "0.3", "--of", "model", "--out", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()


# --max-loss-increase.


def test_max_loss_increase_prunes_as_much_as_fits(
    trained: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    goal = ("--max-loss-increase", 0.2, "--held-out", text_file, "--held-out-windows", 4)
    capsys.readouterr()
    assert prune(trained, text_file, out, *goal, "--repair", "none", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    resolution = report["goal"]
    assert resolution == read_manifest(out)["goal"]  # type: ignore[index]
    fitting = [entry["sparsity"] for entry in resolution["tried"] if entry["fits"]]
    others = [entry["sparsity"] for entry in resolution["tried"] if not entry["fits"]]
    chosen = resolution["budget"]["sparsity"]
    assert 0 < chosen == max(fitting) == pytest.approx(min(others) - 1 / STEPS)
    assert all((entry["value"] <= 0.2) == entry["fits"] for entry in resolution["tried"])
    # What was tried with masked channels is what came out.
    (tried,) = [entry for entry in resolution["tried"] if entry["sparsity"] == chosen]
    assert resolution["result"] == pytest.approx(tried["value"], abs=1e-4)
    assert tried["parameters"] == report["parameters_after"]
    assert report["ffn_sparsity"] == pytest.approx(chosen, abs=8 / WIDTH / BLOCKS)
    page = tmp_path / "report.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert f"--max-loss-increase 0.2, {len(resolution['tried'])} plans tried" in page.read_text()
    card = (out / "README.md").read_text()
    assert f"| {chosen:.1%} | {report['parameters_after']:,} |" in card


def test_max_loss_increase_prints_what_it_tried(
    trained: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    goal = ("--max-loss-increase", 0.2, "--held-out-windows", 3, "--repair", "ridge")
    assert prune(trained, text_file, tmp_path / "out", *goal) == 0
    out = capsys.readouterr().out
    assert "sparsity  parameters  loss increase  fits" in out
    assert "at most 0.2 nats per token over" in out
    assert "(the result: " in out
    assert "repaired by least squares" in out


def test_loss_of_a_model_in_memory(trained: Path, tokenizer: Any, text_file: Path) -> None:
    dense = cfsp.load(trained)
    small = cfsp.prune(
        dense,
        tokenizer,
        goal=MaxLossIncrease(0.2, windows=4),
        multiple=8,
        data=[text_file],
        samples=8,
        seqlen=32,
        repair="none",
    )
    widths = [layer.mlp.down_proj.in_features for layer in small.model.layers]
    assert 8 * BLOCKS < sum(widths) < WIDTH * BLOCKS
    windows = draw_left_over([str(text_file)], tokenizer, samples=8, seqlen=32, seed=0, count=4)
    with torch.inference_mode():
        found = {
            name: model(windows.tokens_NT, labels=windows.tokens_NT).loss.item()
            for name, model in {"dense": dense, "small": small}.items()
        }
    assert found["small"] - found["dense"] <= 0.2 + 1e-4


def test_a_bound_that_nothing_keeps(
    model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loss, "masked_loss", lambda *_: 50.0)
    goal = ("--max-loss-increase", 0.1, "--held-out-windows", 3)
    assert prune(model, text_file, tmp_path / "out", *goal) == 2
    error = capsys.readouterr().err
    assert "cannot stay within 0.1 nats" in error
    assert "already 0.5% of the FFN channels cost 4" in error
    assert not list(tmp_path.iterdir())


# --target-speedup.


def test_latencies_are_linear_between_the_measured_widths() -> None:
    assert [FFN.at(w) for w in (8, 48, 96)] == [0.6, 0.75, 1.0]
    assert FFN.at(28) == pytest.approx(0.675)
    assert FFN.at(72) == pytest.approx(0.875)


def test_what_parts_save_is_added_up(model: Path) -> None:
    units = open_checkpoint(model, None, ("ffn", "kv", "blocks")).units
    whole = [unit.width for unit in units]

    def speedup(kept: dict[tuple[str, int], int], removed: RemovedWhole = NOTHING) -> float:
        kept_U = [kept.get((unit.part, unit.block), unit.width) for unit in units]
        return LATENCIES.speedup(units, kept_U, removed, BLOCKS)

    assert LATENCIES.speedup(units, whole, NOTHING, BLOCKS) == 1
    # A model of different widths takes the mean of what they take.
    assert speedup({("ffn", 0): 8}) == pytest.approx(1 / (1 - 0.4 / BLOCKS))
    assert speedup({("kv", 0): 0, ("kv", 1): 1}) == pytest.approx(1 / (1 - 0.4 / BLOCKS))
    both = {("ffn", 0): 8, ("kv", 1): 1}
    assert speedup(both) == pytest.approx(1 / (1 - 0.5 / BLOCKS))
    # What a block saves is not counted again for its channels.
    gone = {("ffn", 0): 0, ("kv", 0): 0}
    assert speedup(gone, RemovedWhole((0,))) == pytest.approx(1 / (1 - 0.95 / BLOCKS))


def test_models_to_time_have_less_of_each_part(model: Path) -> None:
    parts: tuple[Part, ...] = ("ffn", "kv", "attention", "blocks")
    source = open_checkpoint(model, None, parts)
    whole, timed = models_to_time(source, Budget(multiple=48, parts=parts), 48)
    assert [(each.part, each.kept) for each in timed] == [
        ("ffn", 48), ("kv", 1), ("kv", 0), ("blocks", 0),
    ]  # fmt: skip
    assert [each.share for each in timed] == [1, 1, (BLOCKS // 2) / BLOCKS, (BLOCKS // 2) / BLOCKS]
    sizes = [
        sum(p.numel() for p in empty_model(each.config()).parameters())
        for each in (whole, *(each.model for each in timed))
    ]
    assert sizes[0] == parameter_count(source)
    assert all(size < sizes[0] for size in sizes[1:])
    of_blocks = parameters_of_blocks(source)
    assert sizes[-1] == sizes[0] - sum(of_blocks[(BLOCKS + 1) // 2 :])


@given(st.integers(1, 20000), st.sampled_from([1, 8, 32, 128, 256]))
def test_widths_to_measure(widest: int, multiple: int) -> None:
    widest = max(widest, multiple)
    widths = widths_to_measure(widest, multiple)
    assert widths == sorted(set(widths))
    assert widths[0] == multiple and widths[-1] == widest
    assert len(widths) <= 5
    assert all(width % multiple == 0 for width in widths[:-1])


def resolved(model: Path, statistics: Path, goal: TargetSpeedup) -> Any:
    source = open_checkpoint(model)
    settings = PruneSettings(Budget(0.0, "ffn", 8))
    found = replace(LATENCIES, curves={"ffn": FFN})
    asked = speedup.Speed(goal, source, settings, found)
    return speedup.resolve_speedup(asked, Statistics.load(statistics))


@pytest.mark.parametrize("ratio", [1.05, 1.2, 1.5])
def test_target_speedup_is_the_least_that_is_enough(
    model: Path, statistics: Path, ratio: float
) -> None:
    found = resolved(model, statistics, TargetSpeedup(ratio))
    chosen = found.budget.sparsity
    values = {entry.sparsity: entry.value for entry in found.tried}
    assert values[chosen] >= ratio
    below = round(chosen - 1 / STEPS, 6)
    assert all(value < ratio for sparsity, value in values.items() if sparsity <= below)
    assert any(sparsity == pytest.approx(below) for sparsity in values) or chosen == 1 / STEPS


def test_a_speedup_that_attention_forbids(model: Path, statistics: Path) -> None:
    with pytest.raises(BudgetError, match=r"cannot become 1\.7 times.*1\.6\d times.*reach 1\.67"):
        resolved(model, statistics, TargetSpeedup(1.7))


@pytest.mark.parametrize(
    ("parts", "ratio", "budget"),
    [
        ("blocks", 1.3, {"remove_blocks": 1}),
        ("blocks", 1.9, {"remove_blocks": 2}),
        ("attention", 1.15, {"remove_attentions": 2}),
        ("attention,blocks", 1.2, None),
        ("ffn,kv", 1.4, None),
        ("ffn,blocks", 1.6, None),
        ("ffn,attention", 1.4, None),
    ],
)
@pytest.mark.parametrize("repair", ["none", "ridge"])
def test_a_speed_by_other_parts(
    model: Path, text_file: Path, tmp_path: Path, parts: str, ratio: float,
    budget: dict[str, int] | None, repair: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if repair == "ridge" and parts != "ffn,blocks":
        pytest.skip("once is enough")
    source = open_checkpoint(model, None, tuple(parts.split(",")))  # type: ignore[arg-type]
    curves = {
        part: curve
        for part, curve in LATENCIES.curves.items()
        if part in latency.measured_parts(Budget(parts=parse_parts(parts)).parts)  # type: ignore[arg-type]
    }
    found = replace(LATENCIES, curves=curves)
    monkeypatch.setattr(speedup, "measure_latencies", lambda *_: found)
    monkeypatch.setattr(speedup, "most_speedup", lambda *_: 9.0)
    options = ["--target-speedup", ratio, "--parts", parts, "--repair", repair]
    assert prune(model, text_file, tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out
    assert f"at least {ratio:g} times faster in decode: " in printed
    goal = read_manifest(tmp_path / "out")["goal"]  # type: ignore[index]
    if budget is not None:
        assert {key: goal["budget"][key] for key in budget} == budget
    plan = cfsp.PruningPlan.load(tmp_path / "out" / "cfsp_plan.json")
    kept_U = [unit.kept_width for unit in plan.units]
    removed = RemovedWhole(plan.removed_blocks, plan.removed_attentions)
    assert found.speedup(source.units, kept_U, removed, BLOCKS) >= ratio
    assert goal["tried"]


def test_a_speed_out_of_reach_names_that_of_each_part(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    slow = replace(LATENCIES, curves={"ffn": FFN, "blocks": Curve((0, BLOCKS), (0.5, 1.0))})
    monkeypatch.setattr(speedup, "measure_latencies", lambda *_: slow)
    monkeypatch.setattr(speedup, "most_speedup", lambda *_: 9.0)
    options = ["--target-speedup", 4, "--parts", "ffn,blocks"]
    assert prune(model, text_file, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cannot become 4 times faster with --parts ffn,blocks" in error
    assert "alone, FFN channels reach 1.67, blocks reach" in error
    assert (
        prune(model, text_file, tmp_path / "out", "--target-speedup", 4, "--parts", "experts") == 2
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("phase", PHASES)
def test_a_speedup_beyond_all_sizes_is_refused_before_any_work(
    phase: str,
    model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: object, **__: object) -> None:
        raise AssertionError("nothing needs to be timed or calibrated")

    monkeypatch.setattr(speedup, "measure_latencies", work)
    monkeypatch.setattr(resolve, "calibrated", work)
    arguments = ["--target-speedup", "50", "--target-speedup-of", phase]
    assert prune(model, text_file, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{phase} cannot become 50 times faster" in error
    assert "head and at least 8 channels of every block and attention stay" in error
    assert "FFN channels reach" in error and "blocks reach" in error
    assert not list(tmp_path.iterdir())


def test_the_most_that_sizes_allow_is_the_ratio_of_work(model: Path) -> None:
    source = open_checkpoint(model)
    before = work_of(source, head=True, itemsize=4)
    left = before.block_parameters - BLOCKS * 3 * 32 * (WIDTH - 8)
    after = replace(before, block_parameters=left, block_bytes=4 * left)
    engine = Engine(torch.device("cpu"), torch.float32)
    bytes_ratio = before.decode_bytes(WORKLOAD) / after.decode_bytes(WORKLOAD)
    flops_ratio = before.prefill_flops(WORKLOAD) / after.prefill_flops(WORKLOAD)
    budget = Budget(multiple=8)

    def most(*asked: Any) -> float:
        return latency.most_speedup(source, budget, *asked, engine)

    assert most(("ffn",), "decode") == pytest.approx(bytes_ratio)
    assert most(("ffn",), "prefill") == pytest.approx(flops_ratio)
    head = before.head_bytes
    whole = before.decode_bytes(WORKLOAD)
    assert most(("blocks",), "decode") == pytest.approx(whole / (head + (whole - head) / BLOCKS))


def test_command_with_a_target_speedup(
    model: Path,
    statistics: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = replace(LATENCIES, curves={"ffn": FFN})
    monkeypatch.setattr(speedup, "measure_latencies", lambda *_: found)
    plan = tmp_path / "plan.json"
    command = [
        "plan", str(model), "--statistics", str(statistics), "--multiple", "8",
        "--target-speedup", "1.3", "--target-speedup-of", "prefill",
    ]  # fmt: skip
    assert main([*command, "--out", str(plan)]) == 0
    out = capsys.readouterr().out
    assert "predicted speed-up" in out
    assert "at least 1.3 times faster in prefill" in out
    kept = cfsp.PruningPlan.load(plan).kept_widths
    assert found.speedup(open_checkpoint(model).units, kept, NOTHING, BLOCKS) >= 1.3
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "b.json"), "--json"]) == 0
    conditions = json.loads(capsys.readouterr().out)["goal"]["conditions"]
    assert conditions["relative_latency"] == {"ffn": {"8": 0.6, "48": 0.75, "96": 1.0}}


@pytest.mark.usefixtures("models_start_quickly")
def test_latencies_of_a_real_measurement(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setattr(latency, "WORKLOAD", latency.Workload(prompt=8, new_tokens=2))
    # Where other tests run, almost every round is disturbed.
    monkeypatch.setattr("cfsp.speed.measuring.PATIENCE_SECONDS", 0.01)
    source = open_checkpoint(model)
    engine = Engine(torch.device("cpu"), torch.float32)
    found = measure_latencies(source, Budget(multiple=48), 48, "decode", engine)
    assert found.curves["ffn"].kept == (48, 96)
    assert found.curves["ffn"].relative[-1] == 1.0
    assert found.curves["ffn"].relative[0] > 0
    assert Latencies.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert found.conditions["dtype"] == "float32"


def test_a_busy_machine_is_told(caplog: pytest.LogCaptureFixture) -> None:
    speedup.warn_of_disturbance(LATENCIES)
    assert caplog.messages == []
    speedup.warn_of_disturbance(replace(LATENCIES, conditions={"disturbance": 0.8}))
    assert "took 80% of the processors" in caplog.text


def test_models_that_do_not_fit_are_not_timed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "available_bytes", lambda: 10**9)
    source = open_checkpoint(model)
    engine = Engine(torch.device("cpu"), torch.float32)
    with pytest.raises(UsageError, match=r"5 models.*2\.5 GB; 1\.0 GB are available"):
        measure_latencies(source, Budget(multiple=8), 8, "decode", engine)


def _no_text() -> Any:
    raise AssertionError("latencies need no text")


def test_a_resumed_run_does_not_measure_again(
    model: Path, statistics: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(*_: object) -> Latencies:
        measured.append(1)
        slower = 0.3 * len(measured)
        return replace(LATENCIES, curves={"ffn": Curve((8, 96), (slower, 1.0))})

    monkeypatch.setattr(speedup, "measure_latencies", measure)
    source = open_checkpoint(model)
    settings = PruneSettings(Budget(0.0, "ffn", 8))

    def resolve(ratio: float, identity: str) -> Any:
        place = Workplace(tmp_path, identity={"command": identity})
        loaded = Statistics.load(statistics)
        return resolve_goal(
            source,
            _no_text,
            _no_text,
            replace(settings, goal=TargetSpeedup(ratio)),
            place=place,
            statistics=loaded,
        )[0]

    first = resolve(1.2, "a")
    assert resolve(1.2, "a") == first
    assert len(measured) == 1
    with pytest.raises(ResumeError, match="another command"):
        resolve(1.2, "b")


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --sparsity"),
        (["--sparsity", "0.5", "--target-params", "0.5"], "--sparsity and --target-params"),
        (["--target-speedup", "1.2", "--max-loss-increase", "1"], "found --target-speedup and"),
        (["--target-params", "0.5", "--of", "model"], "--of belongs to --sparsity"),
        (
            ["--parts", "blocks", "--remove-blocks", "1", "--of", "model"],
            "--of belongs to --sparsity, found it with --remove-blocks",
        ),
        (["--sparsity", "0.5", "--held-out", "x"], "--held-out belongs to --max-loss-increase"),
        (["--sparsity", "0.5", "--held-out-windows", "3"], "--held-out-windows belongs to"),
        (["--sparsity", "0.5", "--target-speedup-of", "decode"], "belongs to --target-speedup"),
        (["--target-params", "0"], "--target-params must be in (0, 1], such as 0.7, found 0.0"),
        (["--target-params", "1.5"], "--target-params must be in (0, 1]"),
        (["--target-params", "nan"], "--target-params must be in (0, 1]"),
        (["--target-speedup", "1"], "--target-speedup must be above 1"),
        (["--max-loss-increase", "-1"], "--max-loss-increase must be above 0"),
        (["--max-loss-increase", "nan"], "--max-loss-increase must be above 0"),
        (["--max-loss-increase", "1", "--held-out-windows", "0"], "must be at least 1"),
        (["--target-params", "0.01"], "cannot remove 99.0% of the model's parameters"),
        (["--max-loss-increase", "1", "--statistics", "s"], "needs a --held-out text"),
        (["--plan", "p.json", "--target-params", "0.5"], "--plan and --target-params exclude"),
    ],
)
def test_impossible_goals_are_one_sentence(
    model: Path,
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    capsys.readouterr()
    assert prune(model, text_file, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_numbers_of_what_goes_whole_need_no_sparsity(
    model: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--parts", "blocks", "--set", "remove_blocks=1", "--effort", "fast"]
    assert prune(model, text_file, tmp_path / "out", *arguments) == 0
    in_python = cfsp.prune(
        model, out=tmp_path / "python", parts="blocks", remove_blocks=1, effort="fast",
        data=[str(text_file)], samples=2, seqlen=16,
    )  # fmt: skip
    assert isinstance(in_python, PruneReport)
    assert len(in_python.plan.removed_blocks) == 1
    assert len(PruningPlan.load(tmp_path / "out" / PLAN_FILE).removed_blocks) == 1
    statistics = cfsp.calibrate(model, parts="blocks", data=[text_file], samples=8, seqlen=32)
    planned = cfsp.plan(model, statistics, parts="blocks", remove_blocks=1)
    assert len(planned.removed_blocks) == 1
    capsys.readouterr()
    # Of channels beside them a number says nothing.
    arguments[1] = "ffn,blocks"
    assert prune(model, text_file, tmp_path / "none", *arguments) == 2
    assert "found none" in capsys.readouterr().err


def test_python_wants_a_sparsity_or_a_goal(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found neither"):
        cfsp.prune(model, out=tmp_path / "out")
    with pytest.raises(UsageError, match="found both"):
        cfsp.prune(model, out=tmp_path / "out", sparsity=0.5, goal=TargetParameters(0.5))


def test_a_loss_is_bounded_for_experts_too(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    goal = ("--max-loss-increase", 0.5, "--held-out-windows", 2)
    assert prune(tiny_checkpoint("mixtral"), text_file, out, *goal) == 0
    manifest = read_manifest(out)
    assert manifest is not None
    chosen = [entry for entry in manifest["goal"]["tried"] if entry["fits"]]
    assert max(entry["sparsity"] for entry in chosen) == manifest["goal"]["budget"]["sparsity"] > 0
    # The result is repaired; the bound held before.
    assert manifest["goal"]["result"] < 0.5

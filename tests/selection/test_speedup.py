"""As little goes as is predicted to be so many times faster."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cfsp
from builders import job_of, never, random_tokens, read_json, stopped_at
from cfsp.calibration.calibrate import calibrate
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import MANIFEST_FILE, STATISTICS_FILE
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import empty_model
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.errors import UsageError
from cfsp.planning.candidate import NOTHING, Dropped
from cfsp.planning.make import Planner
from cfsp.selection import speedup
from cfsp.selection.constraint import STEPS
from cfsp.selection.goal import constraint_of
from cfsp.selection.speedup import (
    measure_latencies,
    models_to_time,
    times_faster,
    widths_to_measure,
)
from cfsp.settings import (
    Budget,
    Compute,
    Criterion,
    Part,
    PruneSettings,
    TargetSpeedup,
    Workload,
    names_in,
)
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows
from tiny_decoders import tiny_model
from tiny_models import BLOCKS, WIDTH

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
PARTS: tuple[Part, ...] = ("ffn", "blocks")
# Half of the width saves a quarter of the time, all of it four tenths; all blocks 95 hundredths.
CURVES = {"ffn": [[8, 0.6], [48, 0.75], [96, 1.0]], "blocks": [[0, 0.05], [BLOCKS, 1.0]]}


def test_what_parts_save_is_added_up(model):
    source = open_checkpoint(model, PARTS)

    def speedup(first: int, removed: Dropped = NOTHING) -> float:
        return times_faster(CURVES, source, [first, *[96] * (BLOCKS - 1)], removed)

    # A model of different widths takes the mean of what they take.
    for width, time in zip((8, 28, 48, 72, 96), (0.6, 0.675, 0.75, 0.875, 1.0), strict=True):
        assert speedup(width) == pytest.approx(1 / (1 - (1 - time) / BLOCKS))
    # What a block saves is not counted again for its channels.
    assert speedup(0, Dropped((0,))) == pytest.approx(1 / (1 - 0.95 / BLOCKS))


def test_models_to_time_have_less_of_each_part(model):
    source = open_checkpoint(model, PARTS)
    whole, timed = models_to_time(source, Budget(multiple=48, parts=PARTS))
    half = (BLOCKS + 1) // 2
    assert [(part, kept) for part, kept, _ in timed] == [("ffn", 48), ("blocks", half)]
    sizes = [
        sum(p.numel() for p in empty_model(each).parameters())
        for each in (whole, *(smaller for *_, smaller in timed))
    ]
    assert sizes[0] == source.parameter_count > sizes[1]
    assert sizes[2] == sizes[0] - sum(parameters_of_blocks(source)[half:])


@given(st.integers(1, 20000), st.sampled_from([1, 8, 32, 128, 256]))
def test_widths_to_measure(widest, multiple):
    widest = max(widest, multiple)
    widths = widths_to_measure(widest, multiple)
    assert widths == sorted(set(widths))
    assert widths[0] == multiple and widths[-1] == widest
    assert len(widths) <= 5
    assert all(width % multiple == 0 for width in widths[:-1])


@pytest.fixture
def latencies(monkeypatch) -> Callable[..., dict[str, Any]]:
    """Takes the place of a measurement, with the curves of some parts or others."""

    def take(parts: str, disturbance: float = 0.0, **curves: Any) -> dict[str, Any]:
        found = {part: CURVES[part] for part in parts.split(",")} | curves
        result = {"curves": found, "conditions": {"disturbance": disturbance}}
        monkeypatch.setattr(speedup, "measure_latencies", lambda *_: result)
        return found

    return take


@pytest.mark.parametrize("ratio", [1.05, 1.2, 1.5])
def test_target_speedup_is_the_least_that_is_enough(source, pruned, ratio, latencies):
    latencies("ffn")
    budget = Budget(multiple=8)
    found = speedup.Speedup(source, budget, TargetSpeedup(ratio), RUNTIME, WorkDir(Path()))
    planner = Planner.of(source, Statistics.load(pruned / STATISTICS_FILE), budget, Criterion())
    chosen = found.share(planner, ("ffn",), NOTHING)
    assert chosen is not None
    values = {entry.sparsity: entry.value for entry in found.tried}
    assert values[chosen] >= ratio
    below = round(chosen - 1 / STEPS, 6)
    assert all(value < ratio for sparsity, value in values.items() if sparsity <= below)
    assert any(sparsity == pytest.approx(below) for sparsity in values) or chosen == 1 / STEPS


def test_no_channels_are_enough_where_all_blocks_that_have_some_are_dropped(latencies):
    latencies("ffn,blocks")
    source = LoadedModel(tiny_model("nemotron_h"), PARTS)
    job = job_of(source, PruneSettings(Budget(), compute=Compute("cpu")))
    statistics = calibrate(job, Windows(random_tokens(4, 12), {"text": 4}))
    budget = Budget(parts=PARTS)
    found = speedup.Speedup(source, budget, TargetSpeedup(1000), RUNTIME, WorkDir(Path()))
    planner = Planner.of(source, statistics, budget, Criterion())
    blocks = {unit.block for unit in source.units}
    assert len(blocks) < source.architecture.block_count
    assert found.share(planner, ("ffn",), Dropped(tuple(sorted(blocks)))) is None


@pytest.mark.parametrize(
    ("parts", "ratio", "repair"), [("blocks", 1.9, "none"), ("ffn,blocks", 1.6, "ridge")]
)
def test_a_speed_by_blocks(prune, model, latencies, parts, ratio, repair):
    found, source = latencies(parts), open_checkpoint(model, names_in(parts))
    done = prune("--target-speedup", ratio, "--parts", parts, "--repair", repair)
    assert f"at least {ratio:g} times faster in decode: " in done.said
    goal = done.manifest["goal"]
    assert goal["tried"] and goal["conditions"]["phase"] == "decode"
    assert goal["conditions"]["relative_latency"].keys() == found.keys()
    if parts == "blocks":  # each number is predicted, and told, once
        assert len(goal["tried"]) == len(goal["chosen"]["dropped"]["blocks"]) == 2
    kept_U = [unit.kept_width for unit in done.plan.units]
    assert times_faster(found, source, kept_U, Dropped(done.plan.removed_blocks)) >= ratio


def test_blocks_go_where_no_channel_can(prune, latencies):
    """And no pass repairs channels of which none went."""
    latencies("ffn,blocks")
    done = prune("--target-speedup", 1.4, "--parts", "ffn,blocks", "--multiple", WIDTH)
    assert len(done.plan.removed_blocks) == 1 and not done.plan.narrows
    assert [step["name"] for step in done.manifest["repair"]["steps"]] == ["gaps"]


def test_a_speed_out_of_reach_is_refused_before_any_pass(prune, latencies, monkeypatch):
    """And that of each part is named."""
    latencies("ffn", blocks=[[0, 0.5], [BLOCKS, 1.0]])
    monkeypatch.setattr("cfsp.decide.calibrate", never)
    asked = ("--target-speedup", 4, "--parts", "ffn,blocks", "--target-speedup-of", "prefill")
    error = prune(*asked, status=2).error
    assert "prefill cannot become 4 times faster with --parts ffn,blocks" in error
    assert "(alone, FFN channels reach 1.67, blocks reach 1.50); ask for less\n" in error


@pytest.mark.parametrize("part", ["ffn", "blocks"])
def test_a_speed_out_of_reach_of_what_may_go(prune, latencies, monkeypatch, part):
    latencies(part)
    monkeypatch.setattr("cfsp.decide.calibrate", never)
    asked = ("--target-speedup", 1.6, "--parts", part, "--keep", "0,1")
    ways = "ask for less, or give --parts ffn,blocks, or --keep less"
    said = re.search(
        rf"predicted to be ([\d.]+) times faster at most, .* reach ([\d.]+)\); {ways}",
        prune(*asked, status=2).error,
    )
    assert said is not None and said[1] == said[2] and 1 < float(said[1]) < 1.6


@pytest.mark.parametrize(
    ("samples", "message"), [(10000, "10000 are needed"), (1, "at least 2 windows")]
)
def test_too_little_text_is_said_before_models_are_timed(prune, samples, message, monkeypatch):
    monkeypatch.setattr(speedup, "measure_latencies", never)
    assert message in prune("--target-speedup", 1.2, "--samples", samples, status=2).error


@pytest.mark.usefixtures("models_start_quickly")
def test_latencies_of_a_real_measurement(source, monkeypatch):
    monkeypatch.setattr(speedup, "ROUNDS", 1)
    monkeypatch.setattr(speedup, "WORKLOAD", Workload(prompt=8, new_tokens=2))
    found = measure_latencies(source, Budget(multiple=48), "decode", RUNTIME)
    (least, time), whole = found["curves"]["ffn"]
    assert (least, whole) == (48, [96, 1.0]) and time > 0
    assert json.loads(json.dumps(found)) == found
    assert found["conditions"]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("longest", "prompt", "new_tokens"),
    [(None, 512, 32), (544, 512, 32), (256, 224, 32), (8, 4, 4)],
)
def test_what_is_timed_is_no_more_than_the_model_reads(
    source, monkeypatch, longest, prompt, new_tokens
):
    asked = []

    def note(_: Any, workloads: Any, __: Any) -> None:
        asked.extend(workloads)
        raise ZeroDivisionError

    monkeypatch.setattr(speedup, "longest_input_of", lambda _: longest)
    monkeypatch.setattr(speedup, "compare_speed", note)
    with pytest.raises(ZeroDivisionError):
        measure_latencies(source, Budget(multiple=48), "decode", RUNTIME)
    assert asked == [Workload(prompt=prompt, new_tokens=new_tokens)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_busy_machine_is_told_where_it_computes(source, latencies, caplog, device):
    latencies("blocks", 0.8)
    goal, runtime = TargetSpeedup(1.9), Runtime(torch.device(device), torch.float32)
    found = speedup.Speedup(source, Budget(), goal, runtime, WorkDir(Path()))
    assert found.latencies
    assert ("took 80% of the processors" in caplog.text) == (device == "cpu")


def test_models_that_do_not_fit_are_not_timed(source, monkeypatch):
    monkeypatch.setattr(speedup, "available_bytes", lambda: 10**9)
    with pytest.raises(UsageError, match=r"5 models.*2\.5 GB; 1\.0 GB are available"):
        measure_latencies(source, Budget(multiple=8), "decode", RUNTIME)


def test_a_resumed_run_does_not_measure_again(source, tmp_path, latencies, noted):
    latencies("ffn")
    measured = noted(speedup, "measure_latencies", lambda *given: given)
    settings = PruneSettings(Budget(multiple=8), goal=TargetSpeedup(1.2))
    work_dir = WorkDir(tmp_path, identity={"of": "one command"})
    first, again = (constraint_of(job_of(source, settings, work_dir=work_dir))[1] for _ in range(2))
    assert again.latencies == first.latencies
    assert len(measured) == 1


def test_a_resumed_comparison_tells_what_was_tried(model, text_file, tmp_path, latencies):
    latencies("ffn,blocks")
    how: dict[str, Any] = {"target_speedup": 1.6, "parts": "ffn,blocks", "multiple": 8}
    how |= {"data": [text_file], "samples": 8, "seqlen": 32}
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    stopped_at("cfsp.decide.repair", cfsp.prune, model, out=stopped, **how)
    for out in (stopped, whole):
        cfsp.prune(model, out=out, **how)
    found = [read_json(out / MANIFEST_FILE)["goal"] for out in (stopped, whole)]
    assert found[0] == found[1]
    assert found[0]["tried"]

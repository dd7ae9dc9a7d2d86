"""Speed: what a size promises, what is timed, and that engines generate what the model says."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.pruned_config import config_changes
from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import architecture_of
from cfsp.cli import bench as bench_command
from cfsp.cli.bench import _ratios
from cfsp.errors import CfspError, CheckpointError
from cfsp.exports.registry import export
from cfsp.settings import TimingConditions, Workload
from cfsp.speed.bench import Speed, _speeds, bench
from cfsp.speed.subjects import (
    Engine,
    Footprint,
    ModelProcess,
    Subject,
    Timing,
    build_model,
    busy_seconds,
    model_process,
    random_prompt,
    share_of_others,
)
from forks import Job
from ragged import cut, tiny
from stock import NEW_TOKENS, generated
from tiny_decoders import tiny_model
from tiny_models import build_tiny_model

# The first new token comes with the prompt.
WORKLOAD = Workload(batch=2, prompt=9, new_tokens=NEW_TOKENS - 1)


def test_engine_generates_what_the_model_generates(tmp_path):
    tiny("qwen3", num_hidden_layers=1).save_pretrained(tmp_path)
    timed = Engine(Subject(tmp_path, "tiny"), TimingConditions(dtype="float32"))
    model = load(tmp_path, dtype="float32")
    prompt_BP = random_prompt(model.config.vocab_size, WORKLOAD)
    expected_BN = generated(model, prompt_BP)[:, WORKLOAD.prompt :]
    for _ in range(2):
        timing, tokens_BN = timed.run(WORKLOAD)
        assert tokens_BN.tolist() == expected_BN.tolist()
        assert timing.prefill > 0 and timing.decode > 0


def test_weights_on_disk_are_those_that_are_read(copied):
    weights = copied / "model.safetensors"
    shutil.copy(weights, weights.with_name("consolidated.safetensors"))
    _, footprint = build_model(Subject(copied, "m"), "auto", torch.device("cpu"))
    assert footprint.weight_bytes == weights.stat().st_size


def test_random_model_of_a_shape_computes_finite_numbers():
    original = tiny("llama").config
    changes = config_changes(original, architecture_of(original), (64, 64, 32))
    smaller = changes.applied_to(original)
    model, footprint = build_model(Subject(smaller, "smaller"), "bfloat16", torch.device("cpu"))
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [64, 64, 32]
    assert footprint.parameters == sum(p.numel() for p in set(model.parameters()))
    assert footprint.weight_bytes == 2 * footprint.parameters
    with torch.no_grad():
        assert model(input_ids=torch.zeros((1, 4), dtype=torch.long)).logits.isfinite().all()


@pytest.fixture
def others(monkeypatch):
    """What others are taken to have taken in every run: where tests run, much or little."""
    share, run = [0.0], ModelProcess.run
    monkeypatch.setattr(
        ModelProcess, "run", lambda self, work: replace(run(self, work), disturbance=share[0])
    )
    return share


@pytest.mark.usefixtures("others", "models_start_quickly")
def test_comparison_reports_every_round_of_every_model(tiny_checkpoint, capsys):
    models = [str(tiny_checkpoint("llama")), str(tiny_checkpoint("qwen3"))]
    comparison = bench(models, rounds=3, prompt=[4, 8], new_tokens=2)
    bench_command.print_comparison(comparison)
    out = capsys.readouterr().out
    assert "batch 1, prompt 4, 2 new tokens, 3 rounds; other programs took 0%" in out
    assert f"prefill  {Path(models[0]).name}" in out and f"decode  {Path(models[1]).name}" in out
    for said in ("threads 1, ", "1.000x", "medians of rounds in turns after 2 warm-ups"):
        assert said in out
    report = json.loads(json.dumps(comparison.to_json()))
    assert report["conditions"]["rounds"] == 3
    assert len(report["disturbance"]) == 2
    first, second = report["models"]
    assert [w["prompt"] for w in first["workloads"]] == [4, 8]
    for workload in first["workloads"]:
        assert workload["prefill"]["ratio_by_round"] == [1.0] * 3
        assert workload["decode"]["ideal_ratio"] == 1.0
    for workload in second["workloads"]:
        for phase in ("prefill", "decode"):
            speed = workload[phase]
            assert len(speed["tokens_per_second_by_round"]) == 3
            assert sorted(speed["ratio_by_round"])[1] == speed["ratio"]
            assert speed["ideal_ratio"] != 1.0
        assert workload["seconds_to_first_token"] > 0
    weights = Path(models[0]) / "model.safetensors"
    assert first["weight_bytes"] == weights.stat().st_size
    # The name is short, so a report elsewhere knows the models by their weights.
    assert first["fingerprint"] == open_checkpoint(models[0]).fingerprint
    assert first["dtype"] == "float32"


@pytest.mark.usefixtures("models_start_quickly")
def test_a_machine_that_is_too_busy_gives_no_verdict(model, others, command):
    others[0] = 0.69
    out = command("bench", model, "--prompt", 4, "--new-tokens", 2, "--rounds", 1).out
    assert "other programs took 69% of the processors" in out
    assert "the machine is too busy for a verdict" in out
    assert "1.000x  1.000" not in out  # the ideal stays


@pytest.mark.parametrize(("device", "too_busy"), [("cpu", True), ("cuda:0", False)])
def test_other_programs_disturb_where_they_compute(device, too_busy):
    process: Any = SimpleNamespace(footprint=Footprint(1, 2, 1, 1, 2), facts={"device": device})
    found = _speeds([process], 0, WORKLOAD, [[Timing(1.0, 1.0)]], share_of_others=0.69)
    assert {speed.too_busy for speed in found.values()} == {too_busy}


def test_share_of_others_is_what_the_machine_did_beyond_us():
    processors = os.cpu_count() or 1
    assert share_of_others(4.0, 3.0, 2.0) == pytest.approx(1.0 / (2.0 * processors))
    assert share_of_others(2.9, 3.0, 2.0) == 0.0
    before = busy_seconds()
    sum(i * i for i in range(3_000_000))
    assert busy_seconds() > before


@pytest.mark.usefixtures("models_start_quickly")
def test_errors_in_a_model_process_reach_the_user_as_they_are(tmp_path):
    absent = tmp_path / "absent"
    with (
        pytest.raises(CheckpointError, match="absent does not exist"),
        model_process(Subject(absent, "absent"), TimingConditions()),
    ):
        pass


@pytest.fixture
def asked(monkeypatch):
    """What would be timed: nothing is, of models whose configs do not say how much they read."""
    calls: list[Any] = []
    config = PreTrainedConfig()
    monkeypatch.setattr("cfsp.speed.bench.read_config", lambda directory: (config, None))
    monkeypatch.setattr("cfsp.speed.bench.compare_speed", lambda *values: calls.append(values))
    return calls


def test_bench_times_every_combination(asked, model, tiny_checkpoint):
    other = tiny_checkpoint("qwen3")
    bench([model, other], batch=[1, 2], prompt=4, rounds=3)
    subjects, workloads, conditions = asked[0]
    assert subjects == [Subject(each, each.name) for each in (model, other)]
    assert workloads == [Workload(1, 4, 32), Workload(2, 4, 32)]
    assert conditions == TimingConditions(rounds=3)
    bench([model, model.parent / "." / model.name])
    assert [s.label for s in asked[1][0]] == [model.name] * 2
    assert asked[1][2].warmups == 2


def test_bench_takes_names_as_prune_does(asked, monkeypatch, tmp_path):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    bench(Path("demo"))  # of that name, and not the demo's model
    assert asked[-1][0] == [Subject(Path("demo"), "demo")]
    converted = tmp_path / "converted"
    monkeypatch.setattr("cfsp.speed.bench.locate_model", lambda name: converted)
    bench(tmp_path / "a.gguf")
    assert asked[-1][0] == [Subject(converted, "a.gguf")]


def test_process_has_memory_of_its_own_and_its_death_is_one_sentence(model):
    ballast = torch.ones(400_000_000, dtype=torch.float32)  # 1.6 GB in this process
    with model_process(Subject(model, "tiny"), TimingConditions()) as process:
        assert 50_000_000 < process.peak_bytes()[0] < ballast.nbytes
        for child in multiprocessing.active_children():
            assert child.pid is not None
            # Ctrl-C at a terminal reaches it too; it is ended by us, without a traceback.
            os.kill(child.pid, signal.SIGINT)
            assert process.run(WORKLOAD).prefill > 0
            child.kill()
            child.join()
        with pytest.raises(CfspError, match="ended without an answer"):
            process.run(WORKLOAD)


KILLED = """
import os, signal
from cfsp.speed import subjects

subjects._load = range  # which gives three things, too, and imports no torch
with subjects.model_process(0, 3) as process:
    print(process.executor.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_process_ends_with_the_one_that_is_killed(forks):
    (ended,) = forks(Job("forks.run_code", {"code": KILLED}))
    assert ended.status == -signal.SIGKILL
    with suppress(psutil.NoSuchProcess):  # it has ended
        left, latest = psutil.Process(int(ended.stdout)), time.monotonic() + 30
        while left.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
            if time.monotonic() > latest:
                left.kill()
                pytest.fail("it is still there")


def test_an_export_for_vllm_is_for_its_own_bench(tokenizer, tmp_path, command):
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    export(source.directory, "vllm", tmp_path / "out", verify=False)
    error = command("bench", tmp_path / "out", status=2).err
    assert "exported for vLLM, or time the copy with vllm bench latency" in error


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "phi3", "falcon"])
def test_prefill_work_is_what_torch_counts_besides_attention(name):
    model: Any = tiny_model(name) if name == "falcon" else build_tiny_model(name)
    model.set_attn_implementation("eager")
    found = Footprint.of(LoadedModel(model), 0, 4)
    tokens_BT = torch.zeros((WORKLOAD.batch, WORKLOAD.prompt), dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens_BT, logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"].items()
    # Torch counts attention as such from 2.15 on, before as products in batches.
    matrices = sum(n for operator, n in counts if not re.search("bmm|attention", str(operator)))
    assert 2 * found.prefill_work(WORKLOAD) == pytest.approx(matrices, rel=1e-2)


def test_decode_work_is_all_weights_but_embeddings_and_the_cache(tmp_path):
    model: Any = tiny("qwen3", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    engine = Engine(Subject(tmp_path, "tiny"), TimingConditions(dtype="bfloat16"))
    timing, tokens_BN = engine.run(WORKLOAD)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    weights = 2 * sum(p.numel() for p in matrices)
    weights += 2 * model.get_input_embeddings().weight.numel() * model.config.tie_word_embeddings
    with torch.no_grad():
        cache = model(tokens_BN[:, :1], use_cache=True).past_key_values
    held = cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes  # of a token, in 32 bits
    assert timing.cache_bytes == (WORKLOAD.prompt + WORKLOAD.new_tokens) * held / 2
    assert engine.footprint.decode_work(timing.cache_bytes) == weights + timing.cache_bytes


def test_what_nothing_says_is_unknown():
    unknown = Footprint.of(LoadedModel(tiny_model("mixtral")), 0, 4)
    assert math.isnan(unknown.prefill_work(WORKLOAD)) and math.isnan(unknown.decode_work(1))
    speed = Speed(1, (1.0,), (1.0,), unknown.prefill_work(WORKLOAD))
    assert json.loads(json.dumps(speed.to_json()))["ideal_ratio"] is None
    assert _ratios(speed)[2:] == ("unknown", "")
    assert _ratios(replace(speed, ideal_ratio=2.0))[2:] == ("2.000x", "50%")

"""Speed: what is counted, what is timed, and that engines generate what the model says."""

from __future__ import annotations

import gc
import json
import math
import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import LoadedModel
from cfsp.cli import bench as bench_command
from cfsp.cli import main
from cfsp.errors import CfspError, CheckpointError, MissingExtraError, UsageError
from cfsp.exports.registry import export
from cfsp.speed import Conditions, Workload
from cfsp.speed.bench import _rounds, bench
from cfsp.speed.engines import LlamaCppEngine, TransformersEngine, random_prompt
from cfsp.speed.process import (
    ModelProcess,
    busy_seconds,
    model_process,
    share_of_others,
    start_engine,
)
from cfsp.speed.subjects import SmallerModel, Subject, build_model
from cfsp.speed.work import ENGINES, Timing, work_of
from ragged import cut, tiny
from tiny_models import build_tiny_model

WORKLOAD = Workload(batch=2, prompt=9, new_tokens=5)


def generated(model: Any, prompt_BP: torch.Tensor) -> torch.Tensor:
    """Return what transformers generates."""
    tokens_BT: torch.Tensor = model.generate(
        prompt_BP,
        attention_mask=torch.ones_like(prompt_BP),
        min_new_tokens=WORKLOAD.new_tokens + 1,
        max_new_tokens=WORKLOAD.new_tokens + 1,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens_BT[:, WORKLOAD.prompt :]


def test_engine_generates_what_the_model_generates(tmp_path):
    tiny("qwen3", num_hidden_layers=1).save_pretrained(tmp_path)
    timed = TransformersEngine(Subject(tmp_path, "tiny"), Conditions(dtype="float32"))
    model = load(tmp_path, dtype="float32")
    prompt_BP = random_prompt(model.config.vocab_size, WORKLOAD)
    expected_BN = generated(model, prompt_BP)
    for _ in range(2):
        timing = timed.run(WORKLOAD)
        assert timed.tokens_BN.tolist() == expected_BN.tolist()
        assert timing.prefill > 0
        assert timing.decode > 0


def test_random_model_of_a_shape_computes_finite_numbers():
    original = tiny("llama").config
    smaller = SmallerModel(original, ("ffn",), (64, 64, 32))
    model, footprint = build_model(Subject(smaller, "smaller"), "bfloat16", torch.device("cpu"))
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [64, 64, 32]
    assert footprint.parameters == sum(p.numel() for p in set(model.parameters()))
    assert footprint.disk_bytes == 2 * footprint.parameters
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
    assert (
        "threads 1, " in out
        and "1.000x" in out
        and "medians of rounds in turns after 2 warm-ups" in out
    )
    report = json.loads(json.dumps(comparison.to_json()))
    assert report["conditions"]["rounds"] == 3
    assert len(report["rounds_given_up"]) == len(report["disturbance"]) == 2
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
    assert first["disk_bytes"] == weights.stat().st_size
    assert first["dtype"] == "float32"


@pytest.mark.usefixtures("models_start_quickly")
def test_a_machine_that_is_too_busy_gives_no_verdict(tiny_checkpoint, others, monkeypatch, capsys):
    others[0] = 0.69
    command = ["bench", str(tiny_checkpoint("llama")), "--prompt", "4", "--new-tokens", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "other programs took 69% of the processors" in out
    assert "the machine is too busy for a verdict" in out
    assert "1.000x  1.000" not in out  # the ideal stays


def test_rounds_that_others_disturb_are_measured_again(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("cfsp.speed.bench.time.monotonic", lambda: next(now))

    class Fake:
        """Takes as many seconds for a prefill as there were runs before."""

        def __init__(self, shares: list[float]) -> None:
            self.shares, self.count = shares, 0

        def run(self, workload: Workload) -> Timing:
            share = self.shares[self.count % len(self.shares)]
            self.count += 1
            return Timing(self.count, 1.0, share)

    def rounds(*shares: list[float], patience: float = 10.0) -> tuple[list[Any], int]:
        processes: Any = [Fake(each) for each in shares]
        conditions = Conditions(rounds=4, disturbance=0.05)
        kept, given_up = _rounds(processes, WORKLOAD, conditions, patience, lambda: None)
        return [[timing.prefill for timing in timings] for timings in kept], given_up

    now_and_then = [0.0, 0.3, 0.04]
    assert rounds([0.0], now_and_then) == ([[n, n] for n in (1, 3, 4, 6)], 2)
    # Three that nobody disturbed are enough where patience ends; of fewer nothing is given up.
    assert rounds(now_and_then, patience=2.0) == ([[1], [3], [4]], 2)
    assert rounds(now_and_then, patience=1.0) == ([[1], [2]], 0)
    assert rounds([0.9], patience=5.0) == ([[n] for n in (1, 2, 3, 4, 5)], 0)


def test_share_of_others_is_what_the_machine_did_beyond_us():
    processors = os.cpu_count() or 1
    assert share_of_others(4.0, 3.0, 2.0) == pytest.approx(1.0 / (2.0 * processors))
    assert share_of_others(2.9, 3.0, 2.0) == 0.0
    before = busy_seconds()
    sum(i * i for i in range(3_000_000))
    assert busy_seconds() > before


@pytest.mark.usefixtures("models_start_quickly")
def test_errors_in_a_model_process_reach_the_user_as_they_are(tmp_path, capsys):
    absent = tmp_path / "absent"
    with (
        pytest.raises(CheckpointError, match="absent does not exist"),
        model_process(Subject(absent, "absent"), Conditions()),
    ):
        pass
    assert main(["bench", str(absent)]) == 2
    assert "absent does not exist" in capsys.readouterr().err


@pytest.fixture
def asked(monkeypatch):
    """What would be timed: nothing is."""
    calls: list[Any] = []
    monkeypatch.setattr("cfsp.speed.bench.compare_speed", lambda *values: calls.append(values))
    return calls


def test_bench_times_every_combination(asked, tiny_checkpoint):
    model = tiny_checkpoint("llama")
    other = tiny_checkpoint("qwen3")
    bench([model, other], batch=[1, 2], prompt=4, rounds=3)
    subjects, workloads, conditions = asked[0]
    assert subjects == [Subject(each, each.name) for each in (model, other)]
    assert workloads == [Workload(1, 4, 32), Workload(2, 4, 32)]
    assert conditions == Conditions(rounds=3)
    bench([model, model.parent / "." / model.name])
    assert [s.label for s in asked[1][0]] == [model.name] * 2
    assert asked[1][2].warmups == 2


def test_bench_takes_names_as_prune_does(asked, monkeypatch, tmp_path):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    bench(Path("demo"))  # of that name, and not the demo's model
    assert asked[-1][0] == [Subject(Path("demo"), "demo")]
    converted, file = tmp_path / "converted", tmp_path / "a.gguf"
    file.touch()
    monkeypatch.setattr("cfsp.speed.bench.locate_model", lambda name: converted)
    for engine, reads in (("transformers", converted), ("llama.cpp", file)):
        bench(file, engine=engine)
        assert asked[-1][0] == [Subject(reads, "a.gguf")]


def test_bench_knows_before_it_starts_what_it_cannot_time(asked, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("llama")
    with pytest.raises(CheckpointError, match="absent does not exist"):
        bench([model, tmp_path / "absent"])
    with pytest.raises(UsageError, match=r"llama\.cpp cannot run .*llama"):
        bench([model], engine="llama.cpp")
    file = tmp_path / "a.gguf"
    file.touch()
    with pytest.raises(CheckpointError, match=r"b\.gguf does not exist; make it with: cfsp export"):
        bench([file, tmp_path / "b.gguf"], engine="llama.cpp")
    with pytest.raises(UsageError, match="at least one model"):
        bench([])
    with pytest.raises(UsageError, match="disturbance must be at least 0, found nan"):
        bench([model], disturbance=math.nan)
    assert asked == []


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert len([line for line in lines if line.startswith("  -")]) <= 16


def test_process_has_memory_of_its_own_and_its_death_is_one_sentence(tiny_checkpoint):
    ballast = torch.ones(400_000_000, dtype=torch.float32)  # 1.6 GB in this process
    subject = Subject(tiny_checkpoint("llama"), "tiny")
    with model_process(subject, Conditions()) as process:
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


def test_missing_engine_names_the_extra(tmp_path, monkeypatch):
    for module in ("llama_cpp_py_sync", "llama_cpp_py_sync._cffi_bindings"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[llamacpp\]' in the clone"):
        start_engine(Subject(tmp_path / "model.gguf", "m"), Conditions("llama.cpp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--prompt", "0"], "--prompt must be at least 1, found 0"),
        (["demo", "--new-tokens", "0"], "--new-tokens must be at least 1, found 0"),
        (["demo", "--rounds", "0"], "at least 1 round, found 0"),
        (["demo", "--engine", "llama.cpp"], "it runs .gguf files; make one with: cfsp export"),
        (["a.gguf"], "a.gguf does not exist; give a directory with safetensors"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_parser_knows_every_engine():
    assert bench_command.ENGINES == ENGINES
    with pytest.raises(UsageError, match="found 'tgi'"):
        Conditions(engine="tgi")


def test_an_export_for_vllm_is_for_its_own_bench(tokenizer, tmp_path, capsys):
    source = cut(build_tiny_model("llama"), tokenizer, tmp_path)
    export(source, "vllm", tmp_path / "out", verify=False)
    assert main(["bench", str(tmp_path / "out")]) == 2
    assert "an export for vLLM; time it with vllm bench latency --model" in capsys.readouterr().err
    with pytest.raises(UsageError, match="found 'vllm'; bench by vLLM went"):
        Conditions(engine="vllm")


def test_llama_cpp_generates_what_transformers_generates(tiny_checkpoint, tmp_path):
    pytest.importorskip("llama_cpp_py_sync", reason="the extra `llamacpp` is not installed")
    pytest.importorskip("gguf", reason="the extra `gguf` is not installed")
    from cfsp.checkpoint.llama_cpp import LlamaCpp

    directory, file = tiny_checkpoint("llama"), tmp_path / "tiny.gguf"
    arguments = ["--to", "gguf", "--type", "f32", "--out", str(file), "--no-verify"]
    assert main(["export", str(directory), *arguments]) == 0
    timed = LlamaCppEngine(Subject(file, "tiny"), Conditions(engine="llama.cpp"))
    model = load(directory, dtype="float32")
    prompt_BP = random_prompt(model.config.vocab_size, WORKLOAD)
    expected_BN = generated(model, prompt_BP)
    for _ in range(2):
        timing = timed.run(WORKLOAD)
        assert timed.tokens_BN.tolist() == expected_BN.tolist()
        assert timing.prefill > 0
        assert timing.decode > 0
    # The same model weighs the same, whichever engine runs it; only the cache is in F16 here.
    work = work_of(LoadedModel(model), itemsize=4)
    assert timed.footprint.work.block_parameters == work.block_parameters
    assert timed.footprint.work.block_bytes == work.block_bytes
    assert timed.footprint.work.head_bytes == work.head_bytes
    assert timed.footprint.work.attention_width == work.attention_width
    assert timed.footprint.work.cache_bytes == work.cache_bytes / 2
    del timed
    gc.collect()
    # A message goes to a callback: one that was freed with the engine would crash the process.
    with LlamaCpp(file) as again:
        assert again.feed([1, 2]).isfinite().all()

"""Recovery end to end, on a tiny pruned model."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import cfsp
import cfsp.recovery.loss
import cfsp.recovery.recover
from builders import changed, dying_at, tensors
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE
from cfsp.checkpoint.reading import LoadedModel, parameter_count
from cfsp.cli import main
from cfsp.errors import CfspError, RecoveryError, ResumeError, UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.quality.perplexity import loss_in_memory
from cfsp.recovery.adaptation import allocate_ranks
from cfsp.recovery.data import RecoveryText, WindowData, read_text
from cfsp.recovery.loss import IGNORED, loss_inside, multiplies_only
from cfsp.recovery.prepare import teacher_and_method
from cfsp.recovery.recover import RecoverReport, measured_before, recover_checkpoint
from cfsp.recovery.schedule import Schedule
from cfsp.recovery.settings import (
    Adaptation,
    Limit,
    RecoverSettings,
    Training,
)
from cfsp.recovery.trainer import last_checkpoint, train
from cfsp.result.manifest import read_manifest
from cfsp.settings import Compute, EvaluationText, Text
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.work_dir import Stopwatch, WorkDir
from cfsp.text.drawing import consecutive_windows
from cfsp.text.windows import Windows
from tiny_models import BLOCKS, TRAINED, build_tiny_model

CPU = torch.device("cpu")


def training(steps: int = 6, **changes: Any) -> Training:
    options: dict[str, Any] = {"batch_windows": 4, "seqlen": 32, "evaluations": 2} | changes
    return Training(Limit(steps=steps), **options)


def recover(source: Path, out: Path, text: Path, **options: Any) -> RecoverReport:
    started = options.pop("started", None)
    asked: dict[str, Any] = {"data": (str(text),), "training": training()}
    asked |= {"adaptation": Adaptation(rank=2), **options}
    settings = RecoverSettings(**asked)
    return recover_checkpoint(
        open_checkpoint(source), out, settings, command="cfsp recover pruned", started=started
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def recovered(pruned: Path, out: Path, text_file: Path) -> Callable[..., RecoverReport]:
    """Recovers a model into `out`."""
    return lambda of=pruned, **options: recover(of, out, text_file, **options)


def work_of(out: Path) -> Path:
    """Where a recovery works, beside its output."""
    return out.parent / f"{out.name}.work"


def checkpoints_of(out: Path) -> Path:
    """Where its checkpoints lie."""
    return work_of(out) / "process-0-of-1" / "train"


class Plain(NamedTuple):
    """A recovery by all defaults of these tests, and where it lies."""

    report: RecoverReport
    out: Path


@pytest.fixture(scope="module")
def plain(pruned: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Plain:
    out = tmp_path_factory.mktemp("plain") / "out"
    return Plain(recover(pruned, out, text_file), out)


@pytest.mark.parametrize(("method", "rate"), [("lora", 1e-2), ("full", 4e-3)])
def test_training_helps_and_the_result_has_the_same_layout(
    pruned, recovered, text_file, tokenizer, out, method, rate
):
    report = recovered(
        training=training(16, learning_rate=rate),
        adaptation=Adaptation(method, rank=4),
        evaluation=EvaluationText((str(text_file),), 4, 64),
    )
    kept = {p.name for p in pruned.iterdir()} - {"cfsp.statistics"}
    assert {p.name for p in out.iterdir()} == kept
    for name in ("config.json", "modeling_cfsp.py", PLAN_FILE, "tokenizer.json"):
        assert (out / name).read_bytes() == (pruned / name).read_bytes()
    measured = report.perplexity[str(text_file)]
    assert measured["after"] < 0.9 * measured["before"]
    windows = consecutive_windows(str(text_file), tokenizer, count=4, seqlen=64)
    found = math.exp(loss_in_memory(cfsp.load(out), windows))
    assert found == pytest.approx(measured["after"], rel=1e-4)
    conditions = {"windows": 4, "seqlen": 64, "tokens": 4 * 63, "bos": False}
    assert measured == measured | conditions
    assert not work_of(out).exists()


def test_manifest_and_card_say_how_it_was_recovered(pruned, plain):
    report, out = plain
    manifest, before = (read_manifest(directory) for directory in (out, pruned))
    assert manifest is not None and before is not None
    assert manifest["operation"] == "recover"
    assert manifest["command"] == "cfsp recover pruned"
    assert manifest["pruned"]["command"] == before["command"]
    assert manifest["criterion"] == before["criterion"]
    recovery = manifest["recovery"]
    assert recovery["trainable_parameters"] == report.trainable_parameters
    assert recovery["adaptation"]["allocation"] == "uniform"
    stored = tensors(pruned).items()
    trained = [t.double().flatten() for name, t in stored if name.endswith("_proj.weight")]
    size = float(torch.cat(trained).square().mean().sqrt())
    assert recovery["training"]["learning_rate"] == pytest.approx(0.005 * size, rel=0.01)
    assert [entry["step"] for entry in recovery["history"]] == [0, 3, 6]
    card = (out / "README.md").read_text()
    assert "## How it was pruned" in card
    assert "## How it was recovered" in card
    assert f"{report.trainable_parameters:,} parameters" in card


@pytest.mark.parametrize("method", ["lora", "full"])
def test_only_projections_change_and_ranks_follow_the_plan(pruned, recovered, out, method):
    names = {f"self_attn.{x}_proj" for x in "qkvo"}
    names |= {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    how = Adaptation(method, rank=5, allocation="importance")
    report = recovered(training=training(1, evaluations=1), adaptation=how)
    assert changed(pruned, out) == {
        f"model.layers.{block}.{name}.weight" for block in range(3) for name in names
    }
    units = PruningPlan.load(pruned / PLAN_FILE).units
    ranks = allocate_ranks([unit.importance for unit in units], 5)
    assert report.ranks == (ranks if method == "lora" else [None] * 3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_bfloat16_model_is_trained_and_stays_bfloat16(pruned, recovered, tmp_path, out, method):
    source = tmp_path / "bfloat16"
    shutil.copytree(pruned, source)
    halves = {k: v.to(torch.bfloat16) for k, v in tensors(pruned).items()}
    save_file(halves, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    report = recovered(
        source,
        adaptation=Adaptation(method, rank=2),
        # As on a machine that multiplies bfloat16 natively.
        compute=Compute(dtype="bfloat16"),
        training=training(4, learning_rate=1e-2, evaluations=1),
    )
    assert {v.dtype for v in tensors(out).values()} == {torch.bfloat16}
    assert changed(source, out)
    assert report.history[-1]["held_out"] < report.history[0]["held_out"]


def test_another_seed_gives_other_weights(recovered, out, plain):
    recovered(training=training(seed=1))
    assert changed(plain.out, out)


def test_checkpointing_changes_nothing(recovered, plain):
    other = recovered(training=training(gradient_checkpointing=True))
    assert other.tokens_in_step == plain.report.tokens_in_step
    # Before the first step there is no loss of training.
    for a, b in zip(plain.report.history[1:], other.history[1:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-3)
        assert a["held_out"] == pytest.approx(b["held_out"], abs=1e-3)


# Of Llama's kind are all other tests.
KINDS = (
    TRAINED
    if "CFSP_EVERY_FAMILY" in os.environ
    else ("gemma2", "gpt2", "granite", "llama-biased", "opt-projected")
)


@pytest.mark.parametrize("name", [*KINDS, "qwen2_moe"])
def test_every_kind_of_model_recovers_by_its_stock_loss(
    tiny_checkpoint, recovered, text_file, tokenizer, out, name
):
    dense = tiny_checkpoint(name)
    held_NT = read_text([str(text_file)], tokenizer, seqlen=32).held_out.token_NT
    with torch.inference_mode():
        stock = float(cfsp.load(dense)(input_ids=held_NT, labels=held_NT).loss.exp())
    how = training(3, evaluations=1, learning_rate=6e-3, teacher_weight=0.1)
    report = recovered(dense, training=how, teacher=str(dense))
    before, after = report.history
    # The teacher is the model itself: there is nothing to learn from it yet.
    assert before["held_out"] == pytest.approx(0.9 * math.log(stock), rel=1e-4)
    assert after["held_out"] < before["held_out"]
    assert changed(dense, out)
    assert cfsp.load(out)(input_ids=held_NT[:1]).logits.isfinite().all()


def test_only_models_whose_logits_are_a_product_are_sliced(tiny_checkpoint):
    assert multiplies_only(cfsp.load(tiny_checkpoint("llama")))
    capped = cfsp.load(tiny_checkpoint("gemma2"))
    assert not multiplies_only(capped)
    # Asking leaves the model as it was.
    assert capped(input_ids=torch.tensor([[0, 1]])).logits.shape[-1] == 320


def test_the_less_there_is_to_learn_the_lower_the_rate(recovered, pruned, tiny_checkpoint, out):
    """A KL grows with the square of the way, and the way of Adam is its rate's."""
    full, teacher = Adaptation("full"), str(tiny_checkpoint("llama"))
    report = recovered(adaptation=full, teacher=teacher)
    weights = tensors(out)
    stored = tensors(pruned).items()
    trained = [t.double().flatten() for name, t in stored if name.endswith("_proj.weight")]
    size = float(torch.cat(trained).square().mean().sqrt())
    lost = report.history[0]["held_out"]
    assert 0 < lost < 1
    rate = read_manifest(out)["recovery"]["training"]["learning_rate"]
    assert rate == pytest.approx(0.001 * size * math.sqrt(lost), rel=0.01)
    shutil.rmtree(out)
    recovered(adaptation=full, teacher=teacher, training=training(learning_rate=rate))
    again = tensors(out)
    assert all(torch.allclose(again[name], weights[name], atol=1e-7) for name in weights)


def test_a_teacher_is_learnt_from(recovered, tiny_checkpoint, out, plain):
    dense = str(tiny_checkpoint("llama"))
    taught = recovered(teacher=dense, training=training(teacher_weight=0.3))
    assert taught.history[-1]["held_out"] < taught.history[0]["held_out"]
    assert taught.history[-1]["loss"] != plain.report.history[-1]["loss"]
    assert read_manifest(out)["recovery"]["teacher"] == {"name": dense, "weight": 0.3}


def test_a_run_goes_on_with_the_same_teacher_alone(
    pruned, recovered, tiny_checkpoint, tmp_path, monkeypatch
):
    """Its weights count, and not what it is called."""
    dense, there = tiny_checkpoint("llama"), tmp_path / "dense"
    shutil.copytree(dense, there)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cfsp.recovery.recover.merge", stop)
        recovered(training=training(1, evaluations=1), teacher=str(there))
    weights = tensors(there)
    weights["model.norm.weight"] += 0.1
    save_file(weights, there / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ResumeError, match="another teacher"):
        recovered(training=training(1, evaluations=1), teacher=str(there))


def teacher_of(given: str | None, source: Path, tokenizer: Any) -> str | None:
    settings = RecoverSettings((), training(1), Adaptation("full"), given)
    found, _ = teacher_and_method(settings, open_checkpoint(source), tokenizer, CPU)
    return found and found.label


def test_the_dense_model_teaches_where_it_is_at_hand(
    pruned, tiny_checkpoint, tokenizer, tmp_path, monkeypatch, caplog
):
    dense, other = str(tiny_checkpoint("llama")), str(tiny_checkpoint("qwen2"))
    assert teacher_of("auto", pruned, tokenizer) == dense
    assert teacher_of(str(pruned), pruned, tokenizer) == str(pruned)
    assert teacher_of("none", pruned, tokenizer) is None
    # A model that was not pruned has none.
    assert teacher_of("auto", Path(dense), tokenizer) is None
    assert caplog.messages == []
    # Another model is in its place, or none.
    moved = tmp_path / "moved"
    shutil.copytree(pruned, moved)
    fields = json.loads((moved / MANIFEST_FILE).read_text())
    for name, reason in ((other, "is another model"), ("/no/such", "/no/such does not exist")):
        fields["base_model"]["name"] = name
        (moved / MANIFEST_FILE).write_text(json.dumps(fields))
        assert teacher_of("auto", moved, tokenizer) is None
        assert reason in caplog.text
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    assert teacher_of("auto", pruned, tokenizer) is None
    assert "1e-06 GB are available" in caplog.text


@pytest.mark.parametrize(
    ("bytes_for_each", "options", "expected"),
    [
        (21, {}, "full"),
        (19, {}, "lora"),
        (21, {"adaptation": Adaptation(rank=4)}, "lora"),
        (19, {"adaptation": Adaptation("full")}, "full"),
    ],
)
def test_memory_decides_on_the_method_unless_adapters_are_asked_for(
    pruned, tokenizer, tiny_checkpoint, monkeypatch, bytes_for_each, options, expected
):
    """Full training takes 16 bytes for each parameter, and 4 for each of the teacher's."""
    source, dense = open_checkpoint(pruned), open_checkpoint(tiny_checkpoint("llama"))
    trained, taught = parameter_count(source), parameter_count(dense)
    free = (bytes_for_each - 4) * trained + 4 * taught
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: free)
    settings = RecoverSettings((), training(1), teacher="auto", **options)
    teacher, method = teacher_and_method(settings, source, tokenizer, CPU)
    assert method == expected
    assert (teacher is None) == (bytes_for_each < 20 and expected == "full")


def test_minutes_end_the_run_and_the_schedule(recovered, caplog, monkeypatch):
    caplog.set_level("INFO")
    # Every look at the clock takes a thirtieth of a second, however busy the machine is.
    looks = count()
    clock = SimpleNamespace(monotonic=lambda: next(looks) / 30)
    monkeypatch.setattr("cfsp.recovery.schedule.time", clock)
    how = Training(
        Limit(minutes=0.2), batch_windows=4, seqlen=32, evaluations=3, learning_rate=1e-3
    )
    report = recovered(training=how, started=0.0)
    assert 8 < next(looks) / 30 <= 12
    assert len(report.history) == 4
    assert report.steps > 10
    said = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"step 0, \d+%: held-out loss [\d.]+, learning rate 0.001, "
        r"time for about \d+ steps and \d evaluations",
        next(line for line in said if line.startswith("step 0")),
    )
    assert any(line.startswith("after 2 steps: time for about") for line in said)


@pytest.mark.parametrize("batch_windows", [1, 7])
def test_held_out_loss_is_the_mean_over_labels(tmp_path, batch_windows):
    model = build_tiny_model("llama")
    token_NT = torch.randint(3, 300, (6, 32), generator=torch.Generator().manual_seed(0))
    label_NT = token_NT.clone()
    # As in conversations: of some windows few labels count.
    label_NT[0, 2:] = label_NT[3, 3:] = label_NT[4, 2:] = IGNORED
    held_out = WindowData(token_NT, label_NT)
    logit_NTV = model(token_NT).logits.detach()
    expected = cross_entropy(logit_NTV[:, :-1].flatten(0, 1), held_out.label_NT[:, 1:].flatten())
    text = RecoveryText(WindowData(token_NT, token_NT), held_out, {}, bos=False)
    how = training(1, batch_windows=batch_windows, learning_rate=1e-3)
    with loss_inside(model) as loss:
        place = {"out": tmp_path / "o", "identity": {}, "rank_L": []}
        settings = SimpleNamespace(training=how)
        ready: Any = SimpleNamespace(text=text, settings=settings, **place)
        found = train(model, ready, Schedule(1, 2, time.monotonic()), loss)
    assert found.history[0]["held_out"] == pytest.approx(float(expected), rel=1e-5)


def test_the_best_weights_are_kept(recovered, text_file, tokenizer, out, monkeypatch):
    # From half way on, training goes uphill.
    monkeypatch.setattr(
        "cfsp.recovery.trainer.rate_factor", lambda fraction: 1.0 if fraction < 0.5 else -1.0
    )
    how = training(12, evaluations=6, learning_rate=2e-3)
    report = recovered(training=how, adaptation=Adaptation("full"))
    best = min(report.history, key=lambda entry: entry["held_out"])
    assert report.best_step == best["step"] < 12
    assert report.history[-1]["held_out"] > 0.01 + best["held_out"]
    held_NT = read_text([str(text_file)], tokenizer, seqlen=32).held_out.token_NT
    found = loss_in_memory(cfsp.load(out), Windows(held_NT, {}))
    assert found == pytest.approx(best["held_out"], rel=1e-4)


def command(pruned: Path, text: Path, out: Path, *options: str) -> list[str]:
    return [
        *("recover", str(pruned), "--data", str(text), "--out", str(out), "--rank", "2"),
        *("--batch-windows", "4", "--seqlen", "32", *options),
    ]


@pytest.mark.parametrize(("name", "method"), [("llama", "full"), ("deepseek_v3", "lora")])
def test_a_killed_run_resumes_to_the_same_weights(
    pruned, pruned_type, text_file, tmp_path, name, method, commands
):
    source = pruned if name == "llama" else pruned_type(name)
    options = ("--steps", "6", "--evaluations", "3", "--method", method)
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert main(command(source, text_file, whole, *options)) == 0
    commands.kill(command(source, text_file, out, *options), "training", 5)
    assert not out.exists()
    last = last_checkpoint(checkpoints_of(out))
    assert last is not None
    assert last[0].name == "checkpoint-4"
    # Not by accident: another command leaves the unfinished run as it is.
    assert main(command(source, text_file, out, *options, "--seed", "1")) == 2
    assert main(command(source, text_file, out, *options)) == 0
    assert not work_of(out).exists()
    assert changed(whole, out) == set()
    assert changed(source, out)
    recovery = [read_manifest(directory)["recovery"] for directory in (whole, out)]
    assert recovery[0]["history"] == recovery[1]["history"]
    assert recovery[1]["steps"] == 6


def stop(*args: Any, **options: Any) -> None:
    """Stand in for a user who stops a run."""
    raise KeyboardInterrupt


def test_a_run_that_was_stopped_after_its_last_step_is_not_trained_further(
    pruned, recovered, out, text_file, monkeypatch, plain
):
    evaluation = EvaluationText((str(text_file),), 2, 32)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cfsp.recovery.recover.merge", stop)
        recovered(evaluation=evaluation)
    # Other arguments are refused, and the work stays.
    before = sorted(work_of(out).rglob("*"))
    other = r"another learning_rate \(None; now it is 0\.02\); repeat that .* rm -r .*out\.work"
    with pytest.raises(ResumeError, match=other):
        recovered(evaluation=evaluation, training=training(learning_rate=0.02))
    # As is another text of the same name.
    same_name = EvaluationText((Text(str(text_file), text_file.read_text()[500:]),), 2, 32)
    for another in (EvaluationText(), same_name):
        with pytest.raises(ResumeError, match="another eval"):
            recovered(evaluation=another)
    assert sorted(work_of(out).rglob("*")) == before
    # What was measured before training is not measured again.
    measured = []
    sound = cfsp.recovery.recover.perplexity_by_text

    def measure(*args: Any) -> Any:
        measured.append(args[-1])
        return sound(*args)

    monkeypatch.setattr("cfsp.recovery.recover.perplexity_by_text", measure)
    found = recovered(evaluation=evaluation)
    assert measured == ["recovered"]
    assert found.perplexity[str(text_file)]["before"] > 1
    assert (found.steps, found.best_step) == (plain.report.steps, plain.report.best_step)
    assert found.history == plain.report.history
    assert changed(plain.out, out) == set()  # the same seed gives the same weights


def test_what_is_measured_before_training_is_timed_whole_also_after_a_kill(tmp_path, monkeypatch):
    """It is measured again when all is trained, which is no time to train in."""
    windows = {
        name: Windows(torch.randint(3, 300, (2, 12)), {name: 2}) for name in ("first", "second")
    }
    settings = SimpleNamespace(compute=Compute("cpu", "float32"))
    source = LoadedModel(build_tiny_model("llama"))
    facts = {"source": source, "windows": windows, "settings": settings, "watch": Stopwatch()}
    ready: Any = SimpleNamespace(**facts)
    seen: list[int] = []
    # Of a second model's worth of blocks the last one is missing.
    advance = dying_at(2 * BLOCKS, StreamedBlock.advance, lambda it, *_, **__: it.index, seen)
    monkeypatch.setattr(StreamedBlock, "advance", lambda *args, **how: advance(*args, **how))
    monkeypatch.setattr("cfsp.streaming.work_dir.SHARE_OF_TIME", 1e9)
    with pytest.raises(KeyboardInterrupt):
        measured_before(ready, WorkDir(tmp_path, identity={}))
    assert seen == [*range(BLOCKS)] * 2
    found, seconds = measured_before(ready, WorkDir(tmp_path, identity={}))
    assert seen[2 * BLOCKS :] == [*range(BLOCKS)]
    assert list(found) == list(windows) and seconds > 0


def test_only_the_first_process_makes_a_work_directory(recovered, tmp_path, monkeypatch):
    """The others may be there before it has the lock, or although it is refused."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("cfsp.recovery.trainer.RecoveryTrainer", stop)
    with pytest.raises(KeyboardInterrupt):
        recovered()
    assert list(tmp_path.iterdir()) == []


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for name, state in (("checkpoint-5", '{"global_step": 5}'), ("checkpoint-10", '{"global_')):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-20").mkdir()
    last = last_checkpoint(tmp_path)
    assert last is not None
    assert last[0] == tmp_path / "checkpoint-5"


def test_a_loss_that_is_nan_stops_and_leaves_nothing(recovered, tmp_path, monkeypatch):
    steps = 0
    sound = cfsp.recovery.loss.language_model_loss

    def breaking(*args: Any) -> Any:
        nonlocal steps
        # Steps train with gradients; evaluations do not count.
        steps += torch.is_grad_enabled()
        return sound(*args) * (float("nan") if steps >= 3 else 1.0)

    monkeypatch.setattr("cfsp.recovery.loss.language_model_loss", breaking)
    with pytest.raises(RecoveryError, match=r"the loss is NaN or infinite at step 3; .*lower"):
        recovered(training=training(6, evaluations=6))
    assert list(tmp_path.iterdir()) == []


def test_training_that_does_harm_writes_nothing(pruned, recovered, tmp_path, monkeypatch, caplog):
    # Training goes uphill.
    monkeypatch.setattr("cfsp.recovery.trainer.rate_factor", lambda fraction: -1.0)
    lower = (
        r"did not make the loss on held-out text lower \([\d.]+ before, [\d.]+ at best in 4 "
        rf"steps\), so nothing is written, and {pruned} is the best there is; give it a lower "
        r"--learning-rate \(it was 0\.01\), more steps"
    )
    with pytest.raises(RecoveryError, match=lower):
        recovered(training=training(4, learning_rate=1e-2))
    assert list(tmp_path.iterdir()) == []
    # People are told at half time already.
    told = [line for line in caplog.messages if "no better than before training" in line]
    assert len(told) == 1


@pytest.mark.parametrize(("minutes", "measuring"), [(1e-4, 0), (0.5, 40)])
def test_too_few_minutes_are_refused_before_a_step(
    recovered, text_file, tmp_path, monkeypatch, minutes, measuring
):
    """What measuring takes is no time to train in."""
    monkeypatch.setattr("cfsp.recovery.trainer.RecoveryTrainer.training_step", must_not_load)
    measured = {"perplexity": {}, "seconds": measuring}
    monkeypatch.setattr("cfsp.recovery.recover.load_or_compute", lambda *_: measured)
    how = Training(Limit(minutes=minutes), batch_windows=4, seqlen=32)
    evaluation = EvaluationText((str(text_file),), 2, 32)
    with pytest.raises(UsageError, match=r"too short for one step .* give [12] or more"):
        recovered(training=how, evaluation=evaluation)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_cfsp_did_not_prune(tiny_checkpoint, recovered, out):
    dense = tiny_checkpoint("qwen2")
    by_importance = Adaptation(rank=2, allocation="importance")
    with pytest.raises(RecoveryError, match="recover it with --rank-allocation uniform"):
        recovered(dense, adaptation=by_importance)
    recovered(dense, training=training(2, evaluations=1))
    assert changed(dense, out)
    assert "## How it was recovered" in (out / "README.md").read_text()


def must_not_load(*args: Any) -> Any:
    """Stand in for what comes after all names are checked."""
    raise AssertionError("a model was loaded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ["no_such.txt"]}, "no_such.txt"),
        ({"data": ()}, "give --data"),
        ({"eval": ["no_such.txt"]}, "no_such.txt"),
        ({"eval": ["{text}"], "windows": 10**6}, "1000000 are needed"),
        ({"teacher": "/no/such"}, "/no/such does not exist"),
        ({"teacher": "{other}"}, "the teacher must be the dense model"),
        ({"method": "best"}, "method must be one of auto, lora, full"),
        ({"rank_allocation": "error"}, "--rank-allocation must be one of uniform, importance"),
        ({"dtype": "float16"}, "found --dtype float16"),
        ({"learning_rate": 1e-3}, "suits one method; give --method lora or full"),
        ({"teacher_weight": 2.0}, "--teacher-weight must be at least 0 and at most 1"),
    ],
)
def test_bad_input_is_told_before_any_work(
    pruned, tiny_checkpoint, text_file, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr("cfsp.recovery.recover.load_to_train", must_not_load)
    monkeypatch.setattr("cfsp.recovery.recover.perplexity_by_text", must_not_load)
    if "no_such" in message:  # not even the model is opened, which may be a download
        monkeypatch.setattr("cfsp.recovery.recover.open_checkpoint", must_not_load)
    given: dict[str, Any] = {"data": ["{text}"], "seqlen": 32, "teacher": "none", **options}
    for key in ("data", "eval"):
        given[key] = [name.replace("{text}", str(text_file)) for name in given.get(key, ())]
    given["teacher"] = given["teacher"].replace("{other}", str(tiny_checkpoint("qwen2")))
    with pytest.raises(CfspError, match=message):
        cfsp.recover(pruned, out=tmp_path / "out", steps=1, **given)
    assert list(tmp_path.iterdir()) == []


def test_accelerate_s_own_sharding_is_refused(recovered, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"under accelerate's FSDP.*give --shard"):
        recovered()
    assert not list(tmp_path.glob("out*"))


def test_what_is_typed_reaches_recovery(pruned, text_file, tmp_path, monkeypatch):
    seen: dict[str, Any] = {}

    def note(source: Any, out: Any, settings: RecoverSettings, **_: Any) -> SimpleNamespace:
        seen.update(vars(settings))
        return SimpleNamespace()

    monkeypatch.setattr("cfsp.recovery.recover.recover_checkpoint", note)
    argv = ["recover", str(pruned), "--out", str(tmp_path / "o"), "--data", str(text_file)]
    argv += ["--steps", "3", "--rank", "4", "--gradient-checkpointing", "--set", "seed=2"]
    monkeypatch.setattr("cfsp.cli.recover.print_report", lambda report: None)
    assert main(argv) == 0
    assert seen["adaptation"] == Adaptation(rank=4)
    limit = Limit(steps=3)
    assert seen["training"] == Training(limit, seed=2, gradient_checkpointing=True)
    seen.clear()
    cfsp.recover(pruned, out="o", data=[text_file], steps=3, rank=4, seed=2)
    assert seen["training"] == Training(limit, seed=2)
    with pytest.raises(UsageError, match="unknown argument sed; did you mean seed"):
        cfsp.recover(pruned, out="o", data=[text_file], steps=3, sed=2)

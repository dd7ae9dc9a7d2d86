"""Recoveries that are killed, stopped, too short or of no use; what is refused at once."""

import re
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

import cfsp
import cfsp.recovery.loss
import cfsp.recovery.recover
from builders import changed, edit_tensors, never, raising, random_tokens, read_json, stopped_at
from cfsp.checkpoint.reading import LoadedModel
from cfsp.errors import (
    CalibrationError,
    CfspError,
    CheckpointError,
    OutputError,
    RecoveryError,
    ResumeError,
    UsageError,
)
from cfsp.quality.perplexity import loss_in_memory
from cfsp.recovery.data import read_text
from cfsp.recovery.recover import measured_before
from cfsp.recovery.schedule import saved_pace
from cfsp.recovery.settings import Adaptation, Limit, Training
from cfsp.recovery.trainer import RecoveryTrainer, _exchange, last_checkpoint
from cfsp.result.manifest import add_to_manifest, read_manifest
from cfsp.settings import Compute, EvaluationText, Text
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.work_dir import Stopwatch, WorkDir
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows
from recovery.conftest import recover, stopped, training
from tiny_decoders import tiny_model
from tiny_models import BLOCKS, build_tiny_model


def work_of(out: Path) -> Path:
    return out.parent / f"{out.name}.work"


def test_a_killed_run_resumes_to_the_same_weights(pruned, text_file, tmp_path, commands, command):
    argv = ["recover", str(pruned), "--data", str(text_file), "--batch-windows", "4"]
    argv += ["--seqlen", "32", "--steps", "6", "--evaluations", "3", "--method", "full", "--out"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    command(*argv, whole)
    commands.kill([*argv, str(out)], "training", 5)
    assert not out.exists()
    last = last_checkpoint(work_of(out) / "process-0" / "train")
    assert last is not None and last[0].name == "checkpoint-4"
    # In what it computed first, whatever `auto` means on another machine.
    identity = read_json(last[0].parent / "state.json")["identity"]
    assert identity["dtype"] == "float32" and "torch" in identity["version"]
    # Not by accident: another command leaves the unfinished run as it is.
    command(*argv, out, "--seed", 1, status=2)
    command(*argv, out)
    assert not work_of(out).exists()
    assert changed(whole, out) == set()
    assert changed(pruned, out)
    recovery = [read_manifest(directory)["recovery"] for directory in (whole, out)]
    assert recovery[0]["history"] == recovery[1]["history"]
    assert recovery[1]["steps"] == 6


def test_a_run_goes_on_in_which_a_weight_had_no_gradient(pruned, text_file, tmp_path, monkeypatch):
    """As the adapters of a module that is not called; here until the step at which it is killed."""
    step, killed_at = RecoveryTrainer.training_step, [0]

    def step_of_some(self: Any, model: Any, *args: Any) -> Any:
        if self.state.global_step + 1 == killed_at[0]:
            raise KeyboardInterrupt
        loss = step(self, model, *args)
        if self.state.global_step < 3:
            next(each for each in model.parameters() if each.requires_grad).grad = None
        return loss

    monkeypatch.setattr(RecoveryTrainer, "training_step", step_of_some)
    recover(pruned, tmp_path / "whole", text_file)
    killed_at[0] = 4
    with pytest.raises(KeyboardInterrupt):
        recover(pruned, tmp_path / "killed", text_file)
    killed_at[0] = 0
    recover(pruned, tmp_path / "killed", text_file)
    assert changed(tmp_path / "whole", tmp_path / "killed") == set()


@pytest.mark.parametrize("name", ["gemma3", "mixtral"])
def test_weights_that_are_stored_by_other_names_come_back(
    name, save, text_file, tokenizer, tmp_path, monkeypatch
):
    """The best ones at the end of a run, and after a stop."""
    # From half way on, training goes uphill.
    monkeypatch.setattr(
        "cfsp.recovery.trainer.rate_factor", lambda fraction: 1.0 if fraction < 0.5 else -1.0
    )
    model, whole, killed = save(tiny_model(name)), tmp_path / "whole", tmp_path / "killed"
    how: dict[str, Any] = {"training": training(6, evaluations=3, learning_rate=2e-3)}
    how["adaptation"] = Adaptation("full")
    report = recover(model, whole, text_file, **how)
    best = min(report.history, key=lambda entry: entry["held_out"])
    assert 0 < report.best_step == best["step"] < 6
    held_NT = read_text([str(text_file)], tokenizer, seqlen=32).held_out.token_NT
    found = loss_in_memory(cfsp.load(whole), Windows(held_NT, {}))
    assert found == pytest.approx(best["held_out"], rel=1e-4)
    stopped(recover, model, killed, text_file, **how)
    recover(model, killed, text_file, **how)
    assert changed(whole, killed) == set() < changed(model, killed)


def test_a_run_that_was_stopped_after_its_last_step_is_not_trained_further(
    pruned, recovered, out, text_file, noted, plain, monkeypatch
):
    evaluation = EvaluationText((str(text_file),), 2, 32)
    monkeypatch.chdir(out.parent)
    stopped(recover, pruned, Path(out.name), text_file, evaluation=evaluation)
    # In another directory its best weights are found; else those before training would be written.
    monkeypatch.chdir(out.parent.parent)
    # Other arguments are refused, and the work stays.
    before = sorted(work_of(out).rglob("*"))
    other = (
        r"differs in --learning-rate \(None; now it is 0\.02\); repeat that .* rm -r .*out\.work"
    )
    with pytest.raises(ResumeError, match=other):
        recovered(evaluation=evaluation, training=training(learning_rate=0.02))
    with pytest.raises(ResumeError, match=r"differs in --seqlen \(32; now it is 16\)"):
        recovered(evaluation=evaluation, training=training(seqlen=16))  # which changes the text
    # As is another text of the same name.
    same_name = EvaluationText((Text(str(text_file), text_file.read_text()[500:]),), 2, 32)
    for another in (EvaluationText(), same_name):
        with pytest.raises(ResumeError, match="differs in eval; repeat"):
            recovered(evaluation=another)
    assert sorted(work_of(out).rglob("*")) == before
    last = last_checkpoint(work_of(out) / "process-0" / "train")
    assert last is not None
    # What was measured before training is not measured again.
    measured = noted(cfsp.recovery.recover, "perplexity_by_text", lambda *args: args[-1])
    found = recovered(evaluation=evaluation)
    assert measured == ["recovered"]
    assert found.perplexity[str(text_file)]["before"] > 1
    whole = read_manifest(plain)["recovery"]
    same = ("steps", "best_step", "history")
    assert [vars(found)[key] for key in same] == [whole[key] for key in same]
    assert found.tokens_per_second > 0  # although none is trained on now
    assert found.seconds["train"] > saved_pace(last[1])["elapsed"]
    assert changed(plain, out) == set()  # the same seed gives the same weights


# One step.
SHORT: dict[str, Any] = {"training": training(1, evaluations=1), "adaptation": Adaptation()}


def test_a_run_goes_on_with_the_same_teacher_alone(recovered, copied):
    """Its weights count, and not what it is called."""
    how = {**SHORT, "teacher": str(copied)}
    stopped(recovered, **how)
    edit_tensors(copied / "model.safetensors", lambda found: found["model.norm.weight"].add_(0.1))
    with pytest.raises(ResumeError, match="differs in teacher; repeat"):
        recovered(**how)


def test_a_run_goes_on_as_memory_had_decided(recovered, tmp_path, monkeypatch):
    """Free memory is another one later: the teacher may not be."""
    how = {**SHORT, "teacher": "auto"}
    stopped(recovered, **how)
    for other in ({"teacher": "none"}, {"adaptation": Adaptation("full")}):
        with pytest.raises(ResumeError, match="differs in --"):
            recovered(**{**how, **other})
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    recovered(**how)
    assert read_manifest(tmp_path / "out")["recovery"]["teacher"] is not None


def test_what_a_user_had_chosen_is_not_taken_for_what_memory_decided(recovered):
    stopped(recovered, **SHORT, teacher="none")
    with pytest.raises(ResumeError, match=r"differs in --teacher \(none; now it is auto\)"):
        recovered(**SHORT, teacher="auto")


def test_what_is_measured_before_training_is_timed_whole(tmp_path, monkeypatch, noted):
    """Also after a kill: it is measured again when all is trained, which is no time to train in."""
    windows = {name: Windows(random_tokens(2, 12), {name: 2}) for name in ("first", "second")}
    settings = SimpleNamespace(compute=Compute("cpu", "float32"))
    facts = {"source": LoadedModel(build_tiny_model("llama")), "settings": settings}
    ready: Any = SimpleNamespace(**facts, windows=windows, watch=Stopwatch())
    # Of a second model's worth of blocks the last one is missing.
    seen = noted(StreamedBlock, "advance", lambda it, *_, **__: it.index, dies_at=2 * BLOCKS)
    monkeypatch.setattr("cfsp.streaming.block_pass.SHARE_OF_TIME", 1e9)
    with pytest.raises(KeyboardInterrupt):
        measured_before(ready, WorkDir(tmp_path, identity={}))
    assert seen == [*range(BLOCKS)] * 2
    found, seconds = measured_before(ready, WorkDir(tmp_path, identity={}))
    assert seen[2 * BLOCKS :] == [*range(BLOCKS)]
    assert list(found) == list(windows) and seconds > 0


def test_only_the_first_process_makes_a_work_directory(recovered, tmp_path, monkeypatch):
    """The others may be there before it has the lock, or although it is refused."""
    monkeypatch.setattr("cfsp.processes.process_rank", lambda: 1)
    stopped_at("cfsp.recovery.trainer.RecoveryTrainer", recovered)
    assert list(tmp_path.iterdir()) == []


def test_half_a_checkpoint_is_passed_over(tmp_path):
    for name, state in (("checkpoint-5", '{"global_step": 5}'), ("checkpoint-10", '{"global_')):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-20").mkdir()
    last = last_checkpoint(tmp_path)
    assert last is not None and last[0] == tmp_path / "checkpoint-5"
    for _ in range(2):  # what a killed run left is written over without a word
        _exchange(save, {"weight": torch.ones(2)}, str(tmp_path / "checkpoint-20"), "weights")


def test_minutes_end_the_run_and_the_schedule(recovered, caplog, monkeypatch):
    caplog.set_level("INFO")
    # Every look at the clock takes a thirtieth of a second, however busy the machine is.
    looks = count()
    clock = SimpleNamespace(monotonic=lambda: next(looks) / 30)
    monkeypatch.setattr("cfsp.recovery.schedule.time", clock)
    late = SimpleNamespace(monotonic=lambda: 12.1)  # to write took longer than was thought
    monkeypatch.setattr("cfsp.recovery.recover.time", late)
    how = Training(
        Limit(minutes=0.2), batch_windows=4, seqlen=32, evaluations=3, learning_rate=1e-3
    )
    report = recovered(training=how, started=0.0)
    assert 8 < next(looks) / 30 <= 12
    assert len(report.history) == 4 and report.steps > 10
    said = [record.getMessage() for record in caplog.records]
    assert f"recovery took 1 second more than --max-minutes 0.2; it made {report.steps}" in said[-1]
    assert re.fullmatch(
        r"step 0, \d+%: held-out loss [\d.]+, learning rate from 5e-05 up to 0.001, "
        r"time for about \d+ steps and \d evaluations",
        next(line for line in said if line.startswith("step 0")),
    )


@pytest.mark.parametrize(
    ("bad", "words"), [(0, "the held-out loss is NaN .* step 0"), (3, "the loss is NaN .* step 3")]
)
def test_a_loss_that_is_nan_stops_and_leaves_nothing(recovered, tmp_path, monkeypatch, bad, words):
    steps = 0
    sound = cfsp.recovery.loss.language_model_loss

    def breaking(*args: Any) -> Any:
        nonlocal steps
        # Steps train with gradients; evaluations do not count.
        steps += torch.is_grad_enabled()
        return sound(*args) * (float("nan") if steps >= bad else 1.0)

    monkeypatch.setattr("cfsp.recovery.loss.language_model_loss", breaking)
    # It is in float32 already, which helps where training is in bfloat16.
    with pytest.raises(RecoveryError, match=rf"{words}; .*lower --learning-rate$"):
        recovered(training=training(6, evaluations=6))
    in_bfloat16 = cfsp.recovery.loss.diverged(3, "the loss", in_bfloat16=True)
    assert str(in_bfloat16).endswith("a lower --learning-rate, or in --dtype float32")
    assert list(tmp_path.iterdir()) == []


def error_of_torch(elements: int, path: str = "/dev/full") -> Exception:
    """Return what torch says of a full disk, which depends on how much is written."""
    with pytest.raises(RuntimeError) as raised:
        torch.save(torch.zeros(elements), path)
    return raised.value


@pytest.mark.parametrize(
    ("error", "expected", "said"),
    [
        (OSError(28, "full"), OutputError, r"cannot write .*full; make room there"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_what_stops_saving_is_told(recovered, tmp_path, monkeypatch, error, expected, said):
    written = "torch.distributed.checkpoint.FileSystemWriter.write_data"
    monkeypatch.setattr(written, raising(error))
    with pytest.raises(expected, match=said):
        recovered()
    # The same command goes on from what is whole.
    assert last_checkpoint(work_of(tmp_path / "out") / "process-0" / "train") is None


@pytest.mark.parametrize(
    ("error", "is_of_the_disk"),
    [
        *((error_of_torch(elements), True) for elements in (9, 9999)),
        *((error_of_torch(9, place), True) for place in ("/no/such/place", "/dev")),
        (RuntimeError("File optimizer.pt cannot be opened."), True),  # of an older torch
        (torch.OutOfMemoryError("of memory"), False),
        (RuntimeError("Connection closed by peer"), False),
    ],
)
def test_a_full_disk_has_one_sentence_whoever_writes(error, is_of_the_disk, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.Trainer._save_checkpoint", raising(error))
    trainer = RecoveryTrainer.__new__(RecoveryTrainer)
    trainer.args = SimpleNamespace(output_dir=tmp_path)
    kind, said = type(error), re.escape(str(error).splitlines()[0].split()[-1])
    if is_of_the_disk:
        kind, said = OutputError, f"cannot write .*{said}; make room there"
    with pytest.raises(kind, match=said):
        trainer._save_checkpoint()


def test_who_is_its_own_teacher_is_told_before_a_step(pruned, recovered, tmp_path):
    with pytest.raises(RecoveryError, match=r"is 0 before training: .*; give the dense model"):
        recovered(teacher=str(pruned))
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
    assert caplog.text.count("that is no better than before training") == 1


def test_too_few_minutes_are_refused_before_a_step(recovered, text_file, tmp_path, monkeypatch):
    """What measuring takes is no time to train in."""
    monkeypatch.setattr("cfsp.recovery.trainer.RecoveryTrainer.training_step", never)
    measured = {"perplexity": {}, "seconds": 40}
    monkeypatch.setattr("cfsp.recovery.recover.load_or_compute", lambda *_: measured)
    how = Training(Limit(minutes=0.5), batch_windows=4, seqlen=32)
    evaluation = EvaluationText((str(text_file),), 2, 32)
    with pytest.raises(UsageError, match=r"too short for one step .* give [12] or more"):
        recovered(training=how, evaluation=evaluation)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ()}, "give --data"),
        ({"eval": ["{text}"], "windows": 10**6}, "1000000 are needed"),
        ({"teacher": "/no/such"}, "/no/such does not exist"),
        ({"teacher": "{other}"}, "the teacher must be the dense model"),
        ({"seqlen": 500}, "can read 256 tokens at once, the windows have 500"),
        ({"method": "best"}, "method must be one of lora, full"),
        ({"method": "auto"}, "must be one of lora, full, found 'auto'; leave it out"),
        ({"rank_allocation": "error"}, "--rank-allocation must be one of uniform, importance"),
        ({"dtype": "float16"}, "found --dtype float16"),
        ({"device": "cuda:1"}, "found --device cuda:1; start it with CUDA_VISIBLE_DEVICES=1 and"),
        ({"device": "xpu:1"}, "found --device xpu:1; start it with ZE_AFFINITY_MASK=1 and --dev"),
        ({"device": "npu:1"}, "found --device npu:1; let it see that one alone and --device npu"),
        ({"teacher_weight": 2.0}, "--teacher-weight must be at least 0 and at most 1"),
    ],
)
def test_bad_input_is_told_before_any_work(
    pruned, tiny_checkpoint, text_file, tmp_path, monkeypatch, options, message
):
    monkeypatch.setattr("cfsp.recovery.recover.load_to_train", never)
    monkeypatch.setattr("cfsp.recovery.recover.perplexity_by_text", never)
    given: dict[str, Any] = {"data": ["{text}"], "seqlen": 32, "teacher": "none", **options}
    for key in ("data", "eval"):
        given[key] = [name.replace("{text}", str(text_file)) for name in given.get(key, ())]
    given["teacher"] = given["teacher"].replace("{other}", str(tiny_checkpoint("qwen2")))
    with pytest.raises(CfspError, match=message):
        cfsp.recover(pruned, out=tmp_path / "out", steps=1, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_token_without_an_embedding_is_found_where_text_is_held_out(pruned, recovered, tmp_path):
    source = Path(shutil.copytree(pruned, tmp_path / "source"))
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(source)
    text = Text("t", ["the river runs. " * 40] * 20 + ["<new>" * 40])
    with pytest.raises(CalibrationError, match="the tokenizer gives token id 320, but"):
        recovered(source, data=(text,))


def test_a_damaged_manifest_is_told_before_training(pruned, recovered, tmp_path, noted):
    trained = noted(cfsp.recovery.recover, "load_to_train", never)
    source = Path(shutil.copytree(pruned, tmp_path / "source"))
    add_to_manifest(source, {"base_model": "name"})
    with pytest.raises(CheckpointError, match=r"cfsp\.json is damaged \("):
        recovered(source)
    assert not trained


def test_accelerate_s_own_sharding_is_refused(recovered, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"under accelerate's FSDP.*give --shard"):
        recovered()
    assert not list(tmp_path.glob("out*"))

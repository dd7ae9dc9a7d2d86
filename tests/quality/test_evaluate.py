"""Perplexities of several models, by one process or several, carry their conditions."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from builders import edit_json, edit_tensors, entries, never
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.errors import TextError, UsageError
from cfsp.pipeline import prune_checkpoint
from cfsp.quality.evaluate import Exam, evaluate_models
from cfsp.result.manifest import read_manifest
from cfsp.settings import Budget, Compute, EvaluationText, PruneSettings
from cfsp.text.drawing import consecutive_windows
from cfsp.text.tokenizers import load_tokenizer
from commands import Command
from tiny_models import BLOCKS


@pytest.mark.parametrize("measured", ["data", "answers", "piqa", "lambada_openai"])
def test_what_overflows_in_float16_has_no_score(
    tiny_checkpoint, text_file, tmp_path, command, measured
):
    dense, model = tiny_checkpoint("llama"), tmp_path / "model"
    shutil.copytree(dense, model)
    for name in ("up", "down"):
        at = f"model.layers.1.mlp.{name}_proj.weight"
        edit_tensors(model / "model.safetensors", lambda found, at=at: found[at].mul_(30_000))
    (tmp_path / "piqa.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    (tmp_path / "lambada.jsonl").write_text('{"text": "the river runs"}\n')
    how: list[object] = ["--tasks", measured, "--task-data", tmp_path]
    if measured == "data":
        how = ["--data", text_file, "--windows", 1, "--seqlen", 24]
    elif measured == "answers":
        how = ["--against", dense, "--answers", 1]
    found = command("eval", model, *how, "--dtype", "float16", status=2)
    assert found.err.endswith("the loss is NaN; use --dtype float32 or bfloat16\n")


def test_pruning_measures_in_windows_of_its_own_length(
    tiny_checkpoint, text_file, tmp_path, command
):
    model, out = tiny_checkpoint("gpt2"), tmp_path / "pruned"
    argv = ["prune", model, "--sparsity", 0.5, "--data", text_file, "--samples", 4]
    argv += ["--seqlen", 16, "--eval", text_file, "--windows", 2, "--out", out]
    assert main([*map(str, argv)]) == 0
    manifest = read_manifest(out)
    value = manifest["perplexity"][str(text_file)]
    # As many tokens as the model can read, for that is less than 1024.
    assert (value["seqlen"], value["windows"], value["tokens"]) == (256, 2, 2 * 255)
    argv = ["eval", model, out, "--data", text_file, "--windows", 2, "--json"]
    models = json.loads(command(*argv).out)["models"]
    for side, found in zip(("before", "after"), models, strict=True):
        again = found["perplexity"][str(text_file)]
        assert again.pop("value") == value[side]
        assert again.items() <= value.items()


def test_a_bounded_number_of_windows_is_read_unless_all_are_asked_for(model, text_file, command):
    argv = ["eval", str(model), "--data", str(text_file), "--seqlen", "96"]

    def windows(*more: str) -> int:
        (found,) = json.loads(command(*argv, "--json", *more).out)["models"]
        return int(found["perplexity"][str(text_file)]["windows"])

    assert windows() == 12
    every = consecutive_windows(str(text_file), load_tokenizer(model), count=None, seqlen=96)
    assert windows("--windows", "all") == len(every.tokens_NT) > 12
    error = command(*argv, "--windows", 0, status=2).err
    assert "expected a number of windows from 1, or all, found '0'" in error


def test_a_mistaken_text_is_told_before_any_work(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    for work in ("cfsp.quality.evaluate.streamed_sums", "cfsp.pipeline.decide"):
        monkeypatch.setattr(work, never)
    models, compute = [tiny_checkpoint("llama"), tiny_checkpoint("gpt2")], Compute()
    with pytest.raises(UsageError, match="can read 256 tokens at once"):
        evaluate_models(models, Exam(EvaluationText((str(text_file),), 2, 300), compute))
    too_many = EvaluationText((str(text_file),), 1000)
    with pytest.raises(TextError, match="windows of 256 tokens, 1000 are needed"):
        evaluate_models(models, Exam(too_many, compute))
    cure = "fewer windows, or measure with cfsp eval and a shorter --seqlen"
    with pytest.raises(TextError, match=f"windows of 256 tokens, 1000 are needed .*{cure}"):
        settings = PruneSettings(Budget(0.5), evaluation=too_many)
        prune_checkpoint(Checkpoint(models[0]), tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_models_with_other_tokens_are_told_apart(tiny_checkpoint, text_file, tmp_path, caplog):
    first = tiny_checkpoint("llama")
    other = tmp_path / "other"
    shutil.copytree(first, other)
    edit_json(other / "tokenizer.json", lambda fields: fields["model"].update(merges=[]))
    texts = EvaluationText((str(text_file),), 2, 24)
    evaluate_models([first, first], Exam(texts, Compute()))
    assert not caplog.messages
    evaluate_models([first, other], Exam(texts, Compute()))
    assert caplog.messages == [
        f"{other} cuts text into other tokens than {first}: their perplexities do not compare"
    ]
    with pytest.raises(UsageError, match="needs models with one tokenizer"):
        evaluate_models([other], Exam(texts, Compute()), against=first)


@pytest.fixture
def argv(tiny_checkpoint, text_file, other_text_file) -> list[str]:
    models = ["eval", str(tiny_checkpoint("qwen3")), "--against", str(tiny_checkpoint("llama"))]
    windows = ["--windows", "4", "--seqlen", "32", "--batch-windows", "2", "--dtype", "float32"]
    return [*models, "--data", str(text_file), "--data", str(other_text_file), *windows]


def of(path: Path) -> Any:
    return json.loads(path.read_text())


def test_after_a_death_the_same_command_goes_on(commands, argv, tmp_path):
    """To what one process measures; also where one has nothing to do: of 4 windows in twos."""
    out = tmp_path / "many"
    argv_of_three = [*argv, "--out", str(out)]
    # Windows of the first text have passed both models.
    ended = commands.together(argv_of_three, 3, [2], "within", 2 * BLOCKS + 1, patience=18)
    assert [each.status for each in ended] == [2, 2, -signal.SIGKILL], ended
    assert not out.exists()
    ended = commands.finish(argv_of_three, 3)
    assert [bool(each.stdout) for each in ended] == [True, False, False]
    assert entries(tmp_path) == {"many"}
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert of(out) == of(tmp_path / "one")
    (ended,) = commands(Command(argv_of_three))
    assert ended.status == 0
    assert "is there already; nothing is measured again" in ended.stderr

"""Perplexities of several models, and of one before and after, carry their conditions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from builders import dying_at
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint
from cfsp.cli import main
from cfsp.errors import TextError, UsageError
from cfsp.pipeline import prune_checkpoint
from cfsp.quality import evaluate
from cfsp.quality.evaluate import evaluate_models
from cfsp.quality.perplexity import perplexity, streamed_sums
from cfsp.result.manifest import read_manifest
from cfsp.result.prune_report import PruneReport
from cfsp.settings import Budget, CalibrationText, Compute, EvaluationText, PruneSettings
from cfsp.text.drawing import consecutive_windows
from cfsp.text.tokenizers import load_tokenizer

CONDITIONS = {"tokens", "windows", "seqlen", "bos", "evaluation_part"}


def test_each_value_says_how_it_was_measured(
    tiny_checkpoint, text_file, other_text_file, monkeypatch
):
    directory = tiny_checkpoint("qwen2")
    texts = EvaluationText((str(text_file), str(other_text_file)), 3, 24)
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        (found,) = evaluate_models([directory], texts, Compute(dtype="float32"))
    whole = {"model", "fingerprint", "parameters", "dtype", "perplexity", "windows"}
    assert set(found) == whole
    model = load(directory, dtype="float32")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    tokenizer = load_tokenizer(directory)
    for text, value in found["perplexity"].items():
        assert set(value) == {"value", *CONDITIONS}
        windows = consecutive_windows(text, tokenizer, count=3, seqlen=24)
        assert value["value"] == pytest.approx(perplexity(model, windows).value, rel=1e-5)
        assert (value["tokens"], value["windows"], value["seqlen"]) == (3 * 23, 3, 24)
        assert value["bos"] is False
    assert list(found["perplexity"]) == list(texts.names)


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


def test_a_bounded_number_of_windows_is_read_unless_all_are_asked_for(
    tiny_checkpoint, text_file, capsys, command
):
    model = str(tiny_checkpoint("llama"))
    argv = ["eval", model, "--data", str(text_file), "--seqlen", "96"]

    def windows(*more: str) -> int:
        (found,) = json.loads(command(*argv, "--json", *more).out)["models"]
        return int(found["perplexity"][str(text_file)]["windows"])

    assert windows() == 12
    every = consecutive_windows(str(text_file), load_tokenizer(Path(model)), count=None, seqlen=96)
    assert windows("--windows", "all") == len(every.tokens_NT) > 12
    with pytest.raises(SystemExit):
        main([*argv, "--windows", "0"])
    assert "expected a number of windows from 1, or all, found '0'" in capsys.readouterr().err


def test_a_mistaken_text_is_told_before_any_work(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    with pytest.raises(TextError, match="no_such"):
        evaluate_models(["no/such/model"], EvaluationText(("no_such.txt",)), Compute())
    for work in ("cfsp.quality.evaluate.streamed_sums", "cfsp.pipeline.decide"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("too late"))
    models, compute = [tiny_checkpoint("llama"), tiny_checkpoint("gpt2")], Compute()
    with pytest.raises(UsageError, match="has learnt 256 positions"):
        evaluate_models(models, EvaluationText((str(text_file),), 2, 300), compute)
    too_many = EvaluationText((str(text_file),), 1000)
    with pytest.raises(TextError, match="windows of 256 tokens, 1000 are needed"):
        evaluate_models(models, too_many, compute)
    with pytest.raises(TextError, match="windows of 256 tokens, 1000 are needed"):
        settings = PruneSettings(Budget(0.5), evaluation=too_many)
        prune_checkpoint(Checkpoint(models[0]), tmp_path / "out", settings)
    assert not list(tmp_path.iterdir())


def test_models_with_other_tokens_are_told_apart(tiny_checkpoint, text_file, tmp_path, caplog):
    first = tiny_checkpoint("llama")
    other = tmp_path / "other"
    shutil.copytree(first, other)
    file = other / "tokenizer.json"
    fields = json.loads(file.read_text())
    fields["model"]["merges"] = []
    file.write_text(json.dumps(fields))
    texts = EvaluationText((str(text_file),), 2, 24)
    evaluate_models([first, first], texts, Compute())
    assert not caplog.messages
    evaluate_models([first, other], texts, Compute())
    assert caplog.messages == [
        f"{other} cuts text into other tokens than {first}: their perplexities do not compare"
    ]
    with pytest.raises(UsageError, match="needs models with one tokenizer"):
        evaluate_models([other], texts, Compute(), against=first)


def test_a_killed_evaluation_of_pruning_goes_on(tiny_checkpoint, text_file, tmp_path, monkeypatch):
    source, text = Checkpoint(tiny_checkpoint("llama")), str(text_file)
    settings = PruneSettings(
        Budget(0.5, multiple=8),
        text=CalibrationText((text,), samples=4, seqlen=16),
        compute=Compute(dtype="float32"),
        evaluation=EvaluationText((text,), 2, 24),
    )

    def prune(out: Path) -> PruneReport:
        return prune_checkpoint(source, out, settings)

    with monkeypatch.context() as patched:
        # Of the dense model first.
        second = dying_at(2, streamed_sums, lambda *_, **__: None, [])
        patched.setattr(evaluate, "streamed_sums", second)
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path / "out")
    report, whole = prune(tmp_path / "out"), prune(tmp_path / "whole")
    assert report.perplexity == whole.perplexity
    passes = {f"dense on {text}", f"pruned on {text}"}
    assert passes & set(whole.passes) == passes
    assert passes & set(report.passes) == {f"pruned on {text}"}

"""Perplexity by the block stream, and agreement: those of whole models, with their conditions."""

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from builders import edit_json, edit_tensors, entries, never, numpy_divergence, random_tokens
from cfsp.checkpoint.loading import load
from cfsp.checkpoint.reading import Checkpoint, LoadedModel
from cfsp.cli import main
from cfsp.errors import TextError, UsageError
from cfsp.pipeline import prune_checkpoint
from cfsp.quality import evaluate
from cfsp.quality import perplexity as measuring
from cfsp.quality.evaluate import Exam, evaluate_models, perplexity_by_text
from cfsp.quality.perplexity import divergence_and_agreement, negative_log_likelihood
from cfsp.result.names import short_names
from cfsp.settings import Budget, Compute, EvaluationText, PruneSettings
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.drawing import consecutive_windows
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows
from commands import Command
from tiny_models import BLOCKS, VOCABULARY, build_tiny_model, dense_configs

FLOAT32 = Compute(dtype="float32")


def whole(dense: Path, model: Path, windows: Windows) -> tuple[list[float], list[float], list[int]]:
    """Loss, KL and top-1 agreement of every window, by the two whole models in float64."""
    models = [load(each, dtype="float32") for each in (dense, model)]
    losses, divergences, agreed = [], [], []
    for tokens_T, count in zip(windows.tokens_NT, windows.scored_N.tolist(), strict=True):
        with torch.no_grad():
            dense_PV, model_PV = (
                each(input_ids=tokens_T[None]).logits[0, -count - 1 : -1] for each in models
            )
        loss = cross_entropy(model_PV.double(), tokens_T[-count:], reduction="sum")
        losses.append(float(loss))
        divergences.append(numpy_divergence(dense_PV, model_PV).sum())
        agreed.append(int((dense_PV.argmax(-1) == model_PV.argmax(-1)).sum()))
    return losses, divergences, agreed


def perturbed(dense: Path, directory: Path) -> None:
    """Write a copy of a model with some noise in its weights: many most likely tokens stay."""
    shutil.copytree(dense, directory)
    model = load(dense, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.3 * parameter.abs().mean() * noise
    model.save_pretrained(directory)


# Heads of all kinds: with a bias, scaled, capped, behind a projection; norms and widths of their
# own; and experts.
HEADS = dense_configs(
    "gemma2", "gpt2", "granite", "llama", "llama-biased", "opt-projected", "phi3",
    "stablelm-parallel",
)  # fmt: skip
OTHERS = sorted({*HEADS, "mixtral", "perturbed", "phi", "qwen2"})


@pytest.mark.parametrize("other_name", OTHERS)
def test_it_is_that_of_the_whole_models(
    other_name, tiny_checkpoint, text_file, tmp_path, monkeypatch, noted
):
    # A few positions at a time.
    positions = noted(measuring.Head, "logits", lambda _, hidden_PD: len(hidden_PD))
    monkeypatch.setattr(measuring, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    monkeypatch.setattr(measuring, "_LOSSES_AT_ONCE", 2 * VOCABULARY)
    monkeypatch.setattr(measuring, "_PROBABILITIES_AT_ONCE", 3 * VOCABULARY)
    monkeypatch.setattr(evaluate, "load", never)
    dense = tiny_checkpoint("llama")
    other = tmp_path / "other"
    if other_name == "perturbed":
        perturbed(dense, other)
    else:
        other.symlink_to(tiny_checkpoint(other_name))
    texts = EvaluationText((str(text_file),), 4, 24)
    # In memory, and in a file.
    compute = replace(FLOAT32, memory_budget=1) if other_name == "perturbed" else FLOAT32
    first, second = evaluate_models([other], Exam(texts, compute), against=dense)
    assert (first["model"], second["model"]) == (str(dense), str(other))
    told = {"model", "fingerprint", "parameters", "dtype", "perplexity", "windows"}
    assert first.keys() == second.keys() - {"agreement"} == told
    assert first["parameters"] == load(dense).num_parameters()
    assert max(positions) == 7
    windows = consecutive_windows(str(text_file), load_tokenizer(dense), count=4, seqlen=24)
    losses, divergences, agreed = whole(dense, other, windows)
    found = second["windows"][str(text_file)]
    assert found["digest"] == windows.digest
    assert found["predicted"] == windows.scored_N.tolist()
    assert found["loss"] == pytest.approx(losses, rel=1e-5)
    assert found["divergence"] == pytest.approx(divergences, rel=1e-4)
    assert found["agreed"] == agreed
    assert other_name != "perturbed" or 0 < sum(agreed) < sum(found["predicted"])
    if other_name == "llama":  # a model agrees with itself
        assert set(found["divergence"]) == {0} and agreed == found["predicted"]
    summary = second["agreement"]["texts"][str(text_file)]
    tokens = sum(found["predicted"])
    assert summary["divergence"]["value"] == pytest.approx(sum(divergences) / tokens, rel=1e-4)
    assert summary["agreed"]["value"] == pytest.approx(sum(agreed) / tokens, abs=1e-6)
    conditions = {"tokens": 4 * 23, "windows": 4, "seqlen": 24, "bos": False}
    conditions |= {"evaluation_part": False, "tokens_digest": windows.digest, "dtype": "float32"}
    measured = [each["perplexity"][str(text_file)] for each in (first, second)]
    before, after = (each.pop("value") for each in measured)
    assert measured == [conditions] * 2
    assert after == pytest.approx(math.exp(sum(losses) / tokens), rel=1e-5)
    assert summary["perplexity_ratio"] == pytest.approx(after / before, rel=1e-4)
    assert second["agreement"]["perplexity_ratio"] == summary["perplexity_ratio"]


def test_the_dense_model_streams_once_a_text(tiny_checkpoint, text_file, other_text_file, noted):
    dense, *others = (tiny_checkpoint(name) for name in ("llama", "qwen3", "gemma2"))
    texts = EvaluationText((str(text_file), str(other_text_file)), 3, 24)
    alone = evaluate_models([dense, *others], Exam(texts, FLOAT32))
    seen = noted(evaluate, "streamed_sums", lambda source, *_, **__: source.label)
    # Also where the dense model is named among the others.
    found = evaluate_models([*others, dense], Exam(texts, FLOAT32), against=dense)
    assert [each["model"] for each in found] == [str(each) for each in (dense, *others)]
    assert seen == [str(each) for each in (dense, *others)] * 2
    assert [each["perplexity"] for each in found] == [each["perplexity"] for each in alone]


def test_ruled_out_tokens_count_nothing():
    dense_PV = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf]])
    model_PV = torch.tensor([[1.0, 0.0, -math.inf], [2.0, 0.0, -math.inf]])
    divergence, agreed = divergence_and_agreement(model_PV, dense_PV)
    p = 1 / (1 + math.e)
    assert divergence == pytest.approx(-p + (1 - p), rel=1e-6)
    assert agreed == 1
    assert math.isnan(divergence_and_agreement(model_PV * math.nan, dense_PV)[0])


def test_results_of_other_weights_or_texts_are_not_taken_for_these(copied, tmp_path, command):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("a river runs. " * 100)
    argv = ["eval", copied, "--data", text, "--windows", 2, "--seqlen", 16, "--out", out]
    command(*argv)
    # As LoRA on q and v leaves it.
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(copied / "model.safetensors", lambda tensors: tensors[name].add_(0.1))
    error = command(*argv, status=2).err
    other = "other weights, config or tokenizer"
    assert f"holds something else than was asked for now ({other})" in error
    text.write_text("a stone falls. " * 100)
    assert f"than was asked for now ({other}, texts); choose" in command(*argv, status=2).err
    out.unlink()
    command(*argv)
    # Which tokens end an answer is in it.
    generation = copied / "generation_config.json"
    before = generation.read_bytes()
    edit_json(generation, lambda fields: fields.update(eos_token_id=[1, 7]))
    assert f"than was asked for now ({other}); choose" in command(*argv, status=2).err
    generation.write_bytes(before)
    command(*argv)
    edit_json(out, lambda fields: fields["models"][0].update(perplexity=[]))
    assert f"{out} is damaged (AttributeError" in command(*argv, status=2).err
    edit_json(out, lambda fields: fields.update(identity=["text"]))
    assert "holds something else than was asked for now; choose" in command(*argv, status=2).err


KL = "KL per token, nats"


def test_what_is_printed(tiny_checkpoint, text_file, other_text_file, command):
    dense, other = (str(tiny_checkpoint(name)) for name in ("llama", "qwen3"))
    argv = ["eval", other, other, "--against", dense, "--data", str(text_file)]
    argv += ["--data", str(other_text_file), "--windows", "3"]
    lines = command(*argv).out.splitlines()
    texts = list(short_names([str(text_file), str(other_text_file)]).values())
    names = list(short_names([dense, other]).values())
    assert lines[0].split() == names
    rows = ["parameters", *(f"perplexity, {text}" for text in texts)]
    rows += [f"{each}, {text}" for text in texts for each in (KL, "top-1 agreement, percent")]
    assert [line[: len(row)] for line, row in zip(lines[2:9], rows, strict=False)] == rows
    assert math.isfinite(float(lines[3].removeprefix(rows[1]).split()[0]))
    assert lines[5].count("±") == lines[6].count("±") == 1
    assert lines[10:12] == [
        f"{heading}: 3 windows of 256 tokens, without BOS, in float32, 765 predicted tokens"
        for heading in ("Perplexity", "Agreement with the original")
    ]
    assert ": perplexity ratio " in lines[-2] and " in the geometric mean, " in lines[-2]
    assert lines[-1] == (
        f"against {names[0]}; computed in float32; standard errors of windows, documents and "
        "questions"
    )


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_sliced_loss_is_the_loss(rows, monkeypatch):
    logits_PV = torch.randn(10, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    next_P = torch.arange(10)
    monkeypatch.setattr(measuring, "_LOSSES_AT_ONCE", rows * 50)
    expected = cross_entropy(logits_PV.double(), next_P, reduction="sum")
    assert negative_log_likelihood(logits_PV, next_P) == pytest.approx(float(expected), rel=1e-6)


def test_a_killed_pass_goes_on(tmp_path, monkeypatch, noted):
    source, compute = LoadedModel(build_tiny_model("llama")), replace(FLOAT32, batch_windows=2)
    windows = {"text": Windows(random_tokens(5, 12), {"random": 5})}
    monkeypatch.setattr("cfsp.streaming.block_pass.SHARE_OF_TIME", 1e9)

    def measure(work_dir: WorkDir) -> float:
        found = perplexity_by_text(source, windows, compute, work_dir, "dense")
        return float(found["text"]["value"])

    whole = measure(WorkDir(tmp_path / "whole"))
    entered = noted(measuring.StreamedBlock, "advance", lambda it, *_, **__: it.index, BLOCKS)
    with pytest.raises(KeyboardInterrupt):
        measure(WorkDir(tmp_path, identity={}))
    again = measure(WorkDir(tmp_path, identity={}))
    assert entered == [0, 1, 2, 2]
    assert again == measure(WorkDir(tmp_path, identity={}))  # without any block
    assert len(entered) == BLOCKS + 1
    assert again == whole


# What `cfsp eval` and several processes make of it.


@pytest.mark.parametrize("measured", ["data", "answers", "piqa", "lambada_openai", "prune"])
def test_what_overflows_has_no_score(
    model, copied, text_file, tmp_path, command, measured, monkeypatch
):
    monkeypatch.setattr("cfsp.quality.answers.ANSWER_TOKENS", 2)
    for name in ("up", "down"):
        at = f"model.layers.1.mlp.{name}_proj.weight"
        edit_tensors(copied / "model.safetensors", lambda found, at=at: found[at].mul_(30_000))
    (tmp_path / "piqa.jsonl").write_text('{"query": "a", "choices": ["b", "c"], "gold": 0}\n')
    (tmp_path / "lambada.jsonl").write_text('{"text": "the river runs"}\n')
    how: list[object] = ["--tasks", measured, "--task-data", tmp_path]
    if measured == "data":
        how = ["--data", text_file, "--windows", 1, "--seqlen", 24]
    elif measured == "answers":
        how = ["--against", model, "--answers", 1]
    argv = ["eval", copied, *how]
    if measured == "prune":  # before any other work
        argv = ["prune", copied, "--eval", text_file, "--seqlen", 24, "--out", tmp_path / "out"]
        argv += ["--sparsity", 0.5]
    found = command(*argv, "--dtype", "float16", status=2)
    assert found.err.endswith("the loss is NaN; use --dtype float32 or bfloat16\n")


def test_a_bounded_number_of_windows_is_read_unless_all_are_asked_for(model, text_file, command):
    argv = ["eval", str(model), "--data", str(text_file), "--seqlen", "96"]

    def windows(*more: str) -> int:
        (found,) = json.loads(command(*argv, "--json", *more).out)["models"]
        return int(found["perplexity"][str(text_file)]["windows"])

    assert windows() == 12
    every = consecutive_windows(str(text_file), load_tokenizer(model), count=None, seqlen=96)
    assert windows("--windows", "all") == len(every.tokens_NT) > 12
    error = command(*argv, "--windows", 0, status=2).err
    assert "--windows must be at least 1, found 0" in error


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


def test_models_with_other_tokens_are_told_apart(model, copied, text_file, caplog):
    edit_json(copied / "tokenizer.json", lambda fields: fields["model"].update(merges=[]))
    texts = EvaluationText((str(text_file),), 2, 24)
    evaluate_models([model, model], Exam(texts, Compute()))
    assert not caplog.messages
    evaluate_models([model, copied], Exam(texts, Compute()))
    assert caplog.messages == [
        f"{copied} cuts text into other tokens than {model}: their perplexities do not compare"
    ]
    with pytest.raises(UsageError, match="needs models with one tokenizer"):
        evaluate_models([copied], Exam(texts, Compute()), against=model)


@pytest.fixture
def argv(tiny_checkpoint, text_file, other_text_file) -> list[str]:
    models = ["eval", str(tiny_checkpoint("qwen3")), "--against", str(tiny_checkpoint("llama"))]
    windows = ["--windows", "4", "--seqlen", "32", "--batch-windows", "2", "--dtype", "float32"]
    return [*models, "--data", str(text_file), "--data", str(other_text_file), *windows]


def test_after_a_death_the_same_command_goes_on(commands, argv, tmp_path):
    """To what one process measures; also where one has nothing to do: of 4 windows in twos."""
    out = tmp_path / "many"
    argv_of_three = [*argv, "--out", str(out)]
    # Windows of the first text have passed both models.
    ended = commands.together(argv_of_three, 3, [1], "within", 2 * BLOCKS + 1, patience=18)
    assert [each.status for each in ended] == [2, -signal.SIGKILL, 2], ended
    assert not out.exists()
    ended = commands.finish(argv_of_three, 3)
    assert [bool(each.stdout) for each in ended] == [True, False, False]
    assert entries(tmp_path) == {"many"}
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert json.loads(out.read_text()) == json.loads((tmp_path / "one").read_text())
    (ended,) = commands(Command(argv_of_three))
    assert ended.status == 0
    assert "is there already; nothing is measured again" in ended.stderr

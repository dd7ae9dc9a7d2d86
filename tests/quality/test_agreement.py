"""Agreement with the dense model is that of two whole models; the dense one streams once."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfsp.checkpoint.loading import load
from cfsp.cli import main
from cfsp.quality import evaluate, streaming
from cfsp.quality.agreement import divergence_and_agreement
from cfsp.quality.evaluate import evaluate_models
from cfsp.result.names import short_names
from cfsp.settings import Compute, EvaluationText
from cfsp.text.drawing import consecutive_windows
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows
from tiny_models import VOCABULARY

FLOAT32 = Compute(dtype="float32")


def whole(dense: Path, model: Path, windows: Windows) -> tuple[list[float], list[float], list[int]]:
    """Loss, KL and top-1 agreement of every window, by the two whole models in float64."""
    models = [load(each, dtype="float32") for each in (dense, model)]
    losses, divergences, agreed = [], [], []
    for tokens_T, count in zip(windows.tokens_NT, windows.scored_N.tolist(), strict=True):
        with torch.no_grad():
            dense_PV, model_PV = (
                each(input_ids=tokens_T[None]).logits[0, -count - 1 : -1].double().log_softmax(-1)
                for each in models
            )
        losses.append(-float(model_PV.gather(1, tokens_T[-count:, None]).sum()))
        divergences.append(float((dense_PV.exp() * (dense_PV - model_PV)).sum()))
        agreed.append(int((dense_PV.argmax(-1) == model_PV.argmax(-1)).sum()))
    return losses, divergences, agreed


def perturbed(dense: Path, directory: Path) -> Path:
    """Write a copy of a model with some noise in its weights: many most likely tokens stay."""
    shutil.copytree(dense, directory)
    model = load(dense, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.3 * parameter.abs().mean() * noise
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("other_name", ["gemma2", "perturbed"])
def test_it_is_that_of_the_whole_models(
    other_name: str,
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two models with heads, norms and widths of their own, a few positions at a time.
    monkeypatch.setattr(streaming, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    monkeypatch.setattr("cfsp.quality.agreement._PROBABILITIES_AT_ONCE", 3 * VOCABULARY)
    dense = tiny_checkpoint("llama")
    if other_name == "perturbed":
        other = perturbed(dense, tmp_path / "perturbed")
    else:
        other = tiny_checkpoint(other_name)
    texts = EvaluationText((str(text_file),), 4, 24)
    first, second = evaluate_models([other], texts, FLOAT32, against=dense)
    assert (first["model"], second["model"]) == (str(dense), str(other))
    assert "agreement" not in first
    windows = consecutive_windows(str(text_file), load_tokenizer(dense), count=4, seqlen=24)
    losses, divergences, agreed = whole(dense, other, windows)
    found = second["windows"][str(text_file)]
    assert found["digest"] == windows.digest
    assert found["predicted"] == windows.scored_N.tolist()
    assert found["loss"] == pytest.approx(losses, rel=1e-5)
    assert found["divergence"] == pytest.approx(divergences, rel=1e-4)
    assert found["agreed"] == agreed
    assert other_name != "perturbed" or 0 < sum(agreed) < sum(found["predicted"])
    summary = second["agreement"]["texts"][str(text_file)]
    tokens = sum(found["predicted"])
    assert summary["divergence"]["value"] == pytest.approx(sum(divergences) / tokens, rel=1e-4)
    assert summary["agreed"]["value"] == pytest.approx(sum(agreed) / tokens, abs=1e-6)
    ratio = (
        second["perplexity"][str(text_file)]["value"] / first["perplexity"][str(text_file)]["value"]
    )
    assert summary["perplexity_ratio"] == pytest.approx(ratio, rel=1e-4)
    assert second["agreement"]["perplexity_ratio"] == summary["perplexity_ratio"]


def test_a_model_agrees_with_itself(
    tiny_checkpoint: Callable[[str], Path], text_file: Path
) -> None:
    dense = tiny_checkpoint("llama")
    same = dense.parent / "same"
    same.symlink_to(dense)
    texts = EvaluationText((str(text_file),), 3, 24)
    try:
        _, found = evaluate_models([same], texts, Compute(), against=dense)
    finally:
        same.unlink()
    (of_text,) = found["agreement"]["texts"].values()
    assert of_text["divergence"] == {"value": 0.0, "stderr": 0.0}
    assert of_text["agreed"] == {"value": 1.0, "stderr": 0.0}
    assert of_text["perplexity_ratio"] == 1.0


def test_the_dense_model_streams_once_for_each_text(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    other_text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    plain = evaluate.streamed_sums

    def counted(source: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(source.label)
        return plain(source, *args, **kwargs)

    dense, *others = (tiny_checkpoint(name) for name in ("llama", "qwen3", "gemma2"))
    texts = EvaluationText((str(text_file), str(other_text_file)), 3, 24)
    alone = evaluate_models([dense, *others], texts, FLOAT32)
    monkeypatch.setattr(evaluate, "streamed_sums", counted)
    # Also where the dense model is named among the others.
    found = evaluate_models([*others, dense], texts, FLOAT32, against=dense)
    assert [each["model"] for each in found] == [str(each) for each in (dense, *others)]
    assert seen == [str(each) for each in (dense, *others)] * 2
    assert [each["perplexity"] for each in found] == [each["perplexity"] for each in alone]


def test_hidden_states_beyond_the_budget_go_to_a_file(
    tiny_checkpoint: Callable[[str], Path], text_file: Path
) -> None:
    dense, other = tiny_checkpoint("llama"), tiny_checkpoint("qwen3")
    texts = EvaluationText((str(text_file),), 5, 24)
    in_memory = evaluate_models([other], texts, FLOAT32, against=dense)
    in_file = evaluate_models(
        [other], texts, Compute(dtype="float32", memory_budget=1), against=dense
    )
    assert in_file == in_memory


def test_ruled_out_tokens_count_nothing() -> None:
    dense_PV = torch.tensor([[0.0, 1.0, -math.inf], [2.0, 0.0, -math.inf]])
    model_PV = torch.tensor([[1.0, 0.0, -math.inf], [2.0, 0.0, -math.inf]])
    divergence, agreed = divergence_and_agreement(model_PV, dense_PV)
    p = 1 / (1 + math.e)
    assert divergence == pytest.approx(-p + (1 - p), rel=1e-6)
    assert agreed == 1
    assert math.isnan(divergence_and_agreement(model_PV * math.nan, dense_PV)[0])


def _killed_at(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the nth pass be interrupted; return the list that passes are noted in."""
    seen: list[str] = []
    plain = streaming.streamed_sums

    def sums(source: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["label"])
        if len(seen) == count:
            raise KeyboardInterrupt
        return plain(source, *args, **kwargs)

    monkeypatch.setattr(evaluate, "streamed_sums", sums)
    return seen


def test_an_interrupted_run_goes_on(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = [str(tiny_checkpoint(name)) for name in ("llama", "qwen3", "gemma2")]
    argv = ["eval", *models[1:], "--against", models[0], "--data", str(text_file)]
    argv += ["--data", str(other_text_file), "--windows", "3", "--seqlen", "24"]
    whole, out = tmp_path / "whole.json", tmp_path / "new" / "out.json"
    assert main([*argv, "--out", str(whole)]) == 0
    argv += ["--out", str(out)]
    with monkeypatch.context() as patched:
        _killed_at(6, patched)
        assert main(argv) == 130
    assert not out.exists()
    # Another command is told so.
    assert main([*argv, "--windows", "2"]) == 2
    assert "holds unfinished work with another texts" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        seen = _killed_at(0, patched)
        assert main(argv) == 0
    # The first text is there, and of the second the first two models: the dense one streams once
    # more, to compare the last with.
    assert seen == [f"{models[i]} on {other_text_file}" for i in (0, 2)]
    assert [path.name for path in out.parent.iterdir()] == ["out.json"]
    found, expected = (json.loads(path.read_text()) for path in (out, whole))
    assert found == expected
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "streamed_sums", lambda *_, **__: pytest.fail("again"))
        assert main([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"models": found["models"]}
        assert main([*argv, "--windows", "2"]) == 2
    assert "holds something else than was asked for now" in capsys.readouterr().err


def test_results_of_other_weights_or_texts_are_not_taken_for_these(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), model)
    text = Path(shutil.copy(text_file, tmp_path / "text.txt"))
    argv = ["eval", str(model), "--data", str(text), "--windows", "2", "--seqlen", "16"]
    argv += ["--out", str(tmp_path / "out.json")]
    assert main(argv) == 0
    # As LoRA on q and v leaves it.
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] += 0.1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "holds something else than was asked for now (other weights)" in error
    shutil.copy(other_text_file, text)
    assert main(argv) == 2
    assert "than was asked for now (other weights, texts); choose" in capsys.readouterr().err


def test_what_is_printed(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    other_text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense, other = (str(tiny_checkpoint(name)) for name in ("llama", "qwen3"))
    argv = ["eval", other, "--against", dense, "--data", str(text_file)]
    argv += ["--data", str(other_text_file), "--windows", "3", "--seqlen", "24"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("perplexity")
    assert [line.split()[0] for line in lines[2:4]] == list(short_names([dense, other]).values())
    head = next(i for i, line in enumerate(lines) if "KL per token" in line)
    assert lines[head].split()[:2] == ["model", "text"]
    texts = short_names([str(text_file), str(other_text_file)])
    assert [line.split()[1] for line in lines[head + 2 : head + 4]] == list(texts.values())
    assert lines[head + 2].count("±") == 2
    assert " of dense in the geometric mean, " in lines[-2]
    assert (
        lines[-1]
        == f"against {short_names([dense])[dense]}; KL in nats; standard errors of windows"
    )

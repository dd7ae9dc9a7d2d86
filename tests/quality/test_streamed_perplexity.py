"""Perplexity through the block stream is the whole model's, and survives a kill."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from builders import dying_at
from cfsp.checkpoint.reading import LoadedModel
from cfsp.errors import CalibrationError
from cfsp.quality import perplexity as measuring
from cfsp.quality.evaluate import perplexities
from cfsp.quality.perplexity import negative_log_likelihood
from cfsp.settings import Compute
from cfsp.streaming.work_dir import WorkDir, temporary_work_dir
from cfsp.text.windows import Windows
from tiny_models import BLOCKS, TRAINED, VOCABULARY, build_tiny_model

COMPUTE = Compute("cpu", "float32", batch_windows=2)


def random_windows(count: int = 5, length: int = 12) -> Windows:
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(VOCABULARY, (count, length), generator=generator)
    return Windows(tokens_NT, {"random": count})


def plain(model: Any, windows: Windows) -> float:
    """Return the perplexity by the whole model's own logits."""
    with torch.no_grad():
        logits_NTV = model(input_ids=windows.tokens_NT).logits.double()
    loss = cross_entropy(logits_NTV[:, :-1].flatten(0, 1), windows.tokens_NT[:, 1:].flatten())
    return float(loss.exp())


def streamed(source: Any, windows: Windows, work_dir: WorkDir | None = None) -> dict[str, Any]:
    """Return the perplexity block by block, with its conditions."""
    with temporary_work_dir() as own:
        (found,) = perplexities(
            source, {"text": windows}, COMPUTE, work_dir or own, "dense"
        ).values()
    return found


# Heads of all kinds: with a bias, scaled, capped, behind a projection; and routed blocks before.
NAMES = sorted({*TRAINED, "mixtral", "phi", "qwen2"})


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_whole_models(name):
    model, windows = build_tiny_model(name), random_windows()
    found = streamed(LoadedModel(model), windows)
    assert found.pop("value") == pytest.approx(plain(model, windows), rel=1e-5)
    conditions = {"tokens": 5 * 11, "windows": 5, "seqlen": 12, "bos": False}
    assert found == {**conditions, "evaluation_part": False}


def test_logits_are_never_there_for_more_than_a_slice(monkeypatch):
    model, windows = build_tiny_model("gemma2"), random_windows(3, 20)
    seen: list[int] = []
    logits = measuring.Head.logits

    def counted(head: Any, hidden_PD: torch.Tensor) -> torch.Tensor:
        logits_PV = logits(head, hidden_PD)
        seen.append(logits_PV.numel())
        return logits_PV

    monkeypatch.setattr(measuring.Head, "logits", counted)
    monkeypatch.setattr(measuring, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    monkeypatch.setattr(measuring, "_LOSSES_AT_ONCE", 2 * VOCABULARY)
    found = streamed(LoadedModel(model), windows)
    assert seen == [7 * VOCABULARY, 7 * VOCABULARY, 5 * VOCABULARY] * 3
    assert found["value"] == pytest.approx(plain(model, windows), rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_sliced_loss_is_the_loss(rows, monkeypatch):
    logits_PV = torch.randn(10, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    next_P = torch.arange(10)
    monkeypatch.setattr(measuring, "_LOSSES_AT_ONCE", rows * 50)
    expected = cross_entropy(logits_PV.double(), next_P, reduction="sum")
    assert negative_log_likelihood(logits_PV, next_P) == pytest.approx(float(expected), rel=1e-6)


def test_a_killed_pass_goes_on(tmp_path, monkeypatch):
    source, windows = LoadedModel(build_tiny_model("llama")), random_windows()
    monkeypatch.setattr("cfsp.streaming.pass_state.SHARE_OF_TIME", 1e9)

    def measure(work_dir: WorkDir) -> float:
        return float(streamed(source, windows, work_dir)["value"])

    entered: list[int] = []
    advance = dying_at(
        BLOCKS, measuring.StreamedBlock.advance, lambda it, *_, **__: it.index, entered
    )
    monkeypatch.setattr(
        measuring.StreamedBlock, "advance", lambda *args, **kw: advance(*args, **kw)
    )
    with pytest.raises(KeyboardInterrupt):
        measure(WorkDir(tmp_path, identity={}))
    again = measure(WorkDir(tmp_path, identity={}))
    assert entered == [0, 1, 2, 2]
    assert again == measure(WorkDir(tmp_path, identity={}))  # without any block
    assert len(entered) == BLOCKS + 1
    assert again == pytest.approx(plain(source.model, windows), rel=1e-5)


def test_nan_is_an_error():
    model: Any = build_tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(CalibrationError, match="the loss is NaN; evaluate with --dtype float32"):
        streamed(LoadedModel(model), random_windows())

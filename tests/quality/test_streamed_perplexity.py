"""Perplexity through the block stream is the whole model's, and survives a kill."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from cfsp.checkpoint.reading import LoadedModel
from cfsp.cut.in_memory import build_pruned_model
from cfsp.errors import CalibrationError
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.quality import perplexity as measuring
from cfsp.quality import streaming
from cfsp.quality.perplexity import negative_log_likelihood
from cfsp.quality.streaming import streamed_perplexity
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows
from tiny_models import BLOCKS, DENSE_CONFIGS, TINY_CONFIGS, VOCABULARY, WIDTH, build_tiny_model

CPU = torch.device("cpu")
ENGINE = Runtime(CPU, torch.float32)


def random_windows(count: int = 5, length: int = 12) -> Windows:
    generator = torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(VOCABULARY, (count, length), generator=generator)
    return Windows(tokens_NT, {"random": count})


def plain(model: Any, windows: Windows) -> tuple[float, int]:
    """The whole model's own logits, token by token; and how many tokens were predicted."""
    losses = []
    for tokens_T in windows.tokens_NT:
        with torch.no_grad():
            logits_TV = model(input_ids=tokens_T[None]).logits[0].double()
        losses.append(cross_entropy(logits_TV[:-1], tokens_T[1:], reduction="none"))
    loss = torch.cat(losses)
    return float(loss.mean().exp()), len(loss)


@pytest.mark.parametrize("name", sorted(TINY_CONFIGS))
def test_it_is_the_whole_models(name: str) -> None:
    model, windows = build_tiny_model(name), random_windows()
    expected, tokens = plain(model, windows)
    runtime = Runtime(CPU, torch.float32, 2)
    found = streamed_perplexity(LoadedModel(model), windows, runtime)
    assert found.value == pytest.approx(expected, rel=1e-5)
    assert (found.tokens, found.windows, found.seqlen) == (tokens, 5, 12)
    assert not found.bos


@pytest.mark.parametrize("name", ["gemma2"])
def test_a_pruned_model_is_measured_with_its_own_widths(name: str) -> None:
    assert name in DENSE_CONFIGS
    model, windows = build_tiny_model(name), random_windows()
    source = LoadedModel(model)
    plan = PruningPlan(
        ModelIdentity.of(source),
        {},
        {},
        tuple(UnitPlan(i, WIDTH, tuple(range(0, WIDTH, 2 + i)), 0.1, 0.5) for i in range(BLOCKS)),
    )
    pruned = build_pruned_model(model, source, plan, {})
    found = streamed_perplexity(LoadedModel(pruned), windows, ENGINE)
    assert found.value == pytest.approx(plain(pruned, windows)[0], rel=1e-5)


def test_logits_are_never_there_for_more_than_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = build_tiny_model("gemma2"), random_windows(3, 20)
    seen: list[int] = []
    logits = streaming.Head.logits

    def counted(head: Any, hidden_PD: torch.Tensor) -> torch.Tensor:
        logits_PV = logits(head, hidden_PD)
        seen.append(logits_PV.numel())
        return logits_PV

    monkeypatch.setattr(streaming.Head, "logits", counted)
    monkeypatch.setattr(streaming, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    monkeypatch.setattr(measuring, "_LOSSES_AT_ONCE", 2 * VOCABULARY)
    found = streamed_perplexity(LoadedModel(model), windows, ENGINE)
    assert seen == [7 * VOCABULARY, 7 * VOCABULARY, 5 * VOCABULARY] * 3
    assert found.value == pytest.approx(plain(model, windows)[0], rel=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_sliced_loss_is_the_loss(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_PV = torch.randn(10, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    next_P = torch.arange(10)
    monkeypatch.setattr(measuring, "_LOSSES_AT_ONCE", rows * 50)
    expected = cross_entropy(logits_PV.double(), next_P, reduction="sum")
    assert negative_log_likelihood(logits_PV, next_P) == pytest.approx(float(expected), rel=1e-6)


class _KilledError(Exception):
    pass


def test_a_killed_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, windows = LoadedModel(build_tiny_model("llama")), random_windows()
    monkeypatch.setattr("cfsp.streaming.pass_state.SHARE_OF_TIME", 1e9)

    def measure(work_dir: WorkDir) -> float:
        return streamed_perplexity(source, windows, ENGINE, work_dir=work_dir, name="dense").value

    entered: list[int] = []
    stream = streaming.StreamedBlock.advance

    def killed_at_the_last(block: Any, *args: Any, **kwargs: Any) -> None:
        entered.append(block.index)
        if block.index == BLOCKS - 1 and len(entered) == BLOCKS:
            raise _KilledError
        stream(block, *args, **kwargs)

    monkeypatch.setattr(streaming.StreamedBlock, "advance", killed_at_the_last)
    with pytest.raises(_KilledError):
        measure(WorkDir(tmp_path, identity={}))
    again = measure(WorkDir(tmp_path, identity={}))
    assert entered == [0, 1, 2, 2]
    assert again == measure(WorkDir(tmp_path, identity={}))  # without any block
    assert len(entered) == BLOCKS + 1
    assert again == pytest.approx(plain(source.model, windows)[0], rel=1e-5)


@pytest.fixture
def broken() -> Iterator[Any]:
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    return model


def test_nan_is_an_error(broken: Any) -> None:
    with pytest.raises(CalibrationError, match="the loss is NaN; evaluate with --dtype float32"):
        streamed_perplexity(LoadedModel(broken), random_windows(), ENGINE)

"""A budget that is tried with its repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from builders import job_of
from cfsp.checkpoint.reading import LoadedModel
from cfsp.pipeline import calibrate_source
from cfsp.planning.candidate import Candidate
from cfsp.planning.make import Planner
from cfsp.repair.ladder import repaired_a_little
from cfsp.selection.divergence import dense_predictions, few_beginnings
from cfsp.selection.masks import MaskedModel, masked_channels
from cfsp.selection.search import (
    FITTED_WINDOWS,
    RepairedScore,
    _repaired_score,
    apart,
    masked_score,
)
from cfsp.settings import Budget, CalibrationText, Compute, PruneSettings, TargetParameters
from cfsp.text.drawing import draw_text
from cfsp.text.windows import Windows
from tiny_decoders import tiny_model


def windows(count: int, texts: int) -> Windows:
    tokens_NT = torch.arange(count * 8).view(count, 8)
    return Windows(tokens_NT, {f"text {i}": count // texts for i in range(texts)})


@pytest.mark.parametrize(("count", "texts"), [(128, 1), (16, 2), (128, 8), (126, 9), (5, 1)])
def test_it_is_judged_by_other_windows_than_it_is_fitted_to(count: int, texts: int) -> None:
    fit, judged = apart(windows(count, texts))
    firsts = [{*part.tokens_NT[:, 0].tolist()} for part in (fit, judged)]
    assert not firsts[0] & firsts[1]
    assert 2 <= len(firsts[1]) <= 9
    assert len(firsts[0]) <= FITTED_WINDOWS
    assert len(firsts[0]) >= min(count // 2, FITTED_WINDOWS - texts)


def test_of_many_kinds_of_text_some_are_for_fitting_and_others_for_judging() -> None:
    kinds = windows(126, 9)
    fit, judged = (
        {int(first) // (14 * 8) for first in part.tokens_NT[:, 0]} for part in apart(kinds)
    )
    assert (fit, judged) == ({0, 2, 4, 6, 8}, {1, 3, 5, 7})


def test_of_three_windows_all_are_for_both() -> None:
    fit, judged = apart(windows(3, 1))
    assert len(fit.tokens_NT) == len(judged.tokens_NT) == 3


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=4), ("ffn", "blocks"))


def test_scores_are_those_of_the_plan_and_repair_brings_predictions_nearer(
    source: LoadedModel, text_file: Path, tokenizer: Any
) -> None:
    text = CalibrationText((str(text_file),), samples=16, seqlen=64)
    budget = Budget(multiple=8, parts=("ffn", "blocks"))
    settings = PruneSettings(
        budget, text=text, compute=Compute("cpu", "float32"), goal=TargetParameters(0.9)
    )
    drawn, model = draw_text(text, tokenizer), source.model
    statistics = calibrate_source(source, tokenizer, text, settings.compute)
    planner = Planner.of(source, statistics, budget, settings.criterion)
    job = job_of(source, settings, lambda: drawn)
    after_repair = RepairedScore(job, *apart(drawn), repaired_a_little)
    tokens_NT = few_beginnings(drawn).tokens_NT
    masked = MaskedModel(source, model, torch.split(tokens_NT, 1))
    before = [parameter.clone() for parameter in model.parameters()]

    half = Candidate(parts=("ffn",), sparsity=0.5)
    kept = dict(enumerate(planner.plan(half).kept_channels))
    with torch.inference_mode():
        dense = dense_predictions(model, tokens_NT)
        with masked_channels(source, model, kept):
            expected = dense.divergence(model)
    found = masked_score(masked, planner, half)
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < after_repair.score(planner, half) < found
    nothing = Candidate(parts=("ffn",), sparsity=0.0)
    assert after_repair.score(planner, nothing) == pytest.approx(0, abs=1e-6)
    assert masked_score(masked, planner, nothing) == pytest.approx(0, abs=1e-6)
    assert all(map(torch.equal, before, model.parameters()))


def test_without_room_for_a_second_model_nothing_is_repaired(
    source: LoadedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    settings = PruneSettings(Budget(), compute=Compute("cpu", "float32"))
    assert _repaired_score(job_of(source, settings), repaired_a_little) is None
    assert "compared before repair" in caplog.text

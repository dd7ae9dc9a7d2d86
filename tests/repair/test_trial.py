"""A budget that is tried with its repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.checkpoint.reading import LoadedModel
from cfsp.engine.compute import engine_of
from cfsp.families.tiny import tiny_model
from cfsp.pipeline import calibrate_source
from cfsp.planning.make import make_plan
from cfsp.repair.trial import FITTED_PER_JUDGED, apart, divergence_when_repaired
from cfsp.settings import Budget, CalibrationText, Compute, PruneSettings
from cfsp.text.windows import Windows, draw_text
from cfsp.whole_model.divergence import dense_predictions
from cfsp.whole_model.masks import masked_channels
from cfsp.whole_model.sensitivity import few_beginnings


def windows(count: int, texts: int) -> Windows:
    tokens_NT = torch.arange(count * 8).view(count, 8)
    return Windows(tokens_NT, {f"text {i}": count // texts for i in range(texts)})


@pytest.mark.parametrize(("count", "texts"), [(128, 1), (128, 8), (126, 9), (36, 9), (16, 2)])
def test_it_is_judged_by_other_windows_than_it_is_fitted_to(count: int, texts: int) -> None:
    fit, judged = apart(windows(count, texts))
    of_each = min(FITTED_PER_JUDGED, count // max(8, texts) - 1)
    assert len(judged.tokens_NT) == max(8, texts)
    assert len({*fit.tokens_NT[:, 0].tolist()}) == of_each * max(8, texts)
    assert not {*fit.tokens_NT[:, 0].tolist()} & {*judged.tokens_NT[:, 0].tolist()}


def test_of_little_text_all_is_used() -> None:
    fit, judged = apart(windows(5, 1))
    assert len(fit.tokens_NT) == len(judged.tokens_NT) == 5


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=4), ("ffn", "blocks"))


def test_repair_brings_the_predictions_nearer(
    source: LoadedModel, text_file: Path, tokenizer: Any
) -> None:
    budget = Budget(0.5, parts=("ffn", "blocks"), multiple=8, remove_blocks=0)
    text = CalibrationText((str(text_file),), samples=16, seqlen=64)
    settings = PruneSettings(budget, text=text, compute=Compute("cpu", "float32"))
    engine = engine_of(settings.compute, source)
    drawn, model = draw_text(text, tokenizer), source.model
    statistics = calibrate_source(source, tokenizer, text, settings.compute)
    divergence = divergence_when_repaired(source, drawn, settings, engine)
    plan = make_plan(source, statistics, budget, settings.criterion)
    with torch.inference_mode():
        dense = dense_predictions(model, few_beginnings(drawn).tokens_NT)
        with masked_channels(source, model, dict(enumerate(plan.kept_channels))):
            unrepaired = dense.divergence(model)
    before = [parameter.clone() for parameter in model.parameters()]
    assert divergence is not None
    assert 0 < divergence(statistics, budget) < unrepaired
    assert all(map(torch.equal, before, model.parameters()))


def test_nothing_removed_changes_nothing(
    source: LoadedModel, text_file: Path, tokenizer: Any
) -> None:
    text = CalibrationText((str(text_file),), samples=4, seqlen=32)
    settings = PruneSettings(Budget(0.0), text=text, compute=Compute("cpu", "float32"))
    engine = engine_of(settings.compute, source)
    statistics = calibrate_source(source, tokenizer, text, settings.compute)
    divergence = divergence_when_repaired(source, draw_text(text, tokenizer), settings, engine)
    assert divergence is not None
    assert divergence(statistics, Budget(0.0)) == pytest.approx(0, abs=1e-6)


def test_without_room_for_a_second_model_nothing_is_repaired(
    source: LoadedModel,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("cfsp.engine.whole.available_bytes", lambda: 1000)
    budget = Budget(0.5, parts=("ffn", "blocks"))
    settings = PruneSettings(budget, compute=Compute("cpu", "float32"))
    engine = engine_of(settings.compute, source)
    assert divergence_when_repaired(source, windows(16, 1), settings, engine) is None
    assert "compared before repair" in caplog.text

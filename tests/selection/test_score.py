"""A budget that is tried with its repair."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cfsp.repair.trial import FITTED_WINDOWS, apart, divergence_when_repaired

from cfsp.checkpoint.reading import LoadedModel
from cfsp.engine.compute import engine_of
from cfsp.pipeline import calibrate_source
from cfsp.planning.make import make_plan
from cfsp.selection.divergence import dense_predictions, few_beginnings
from cfsp.selection.masks import masked_channels
from cfsp.settings import Budget, CalibrationText, Compute, PruneSettings
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

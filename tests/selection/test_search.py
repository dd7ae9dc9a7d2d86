"""How many blocks go beside channels: as many as change the predictions least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cfsp.planning.removal_budget import RemovedWhole
from cfsp.whole_model import removal_order, removal_trial
from cfsp.whole_model.removal_trial import Trial, best_of, with_removal_count, worth_a_repair

import cfsp
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import LoadedModel, parameter_count
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.engine.compute import engine_of
from cfsp.engine.workplace import temporary_workplace
from cfsp.errors import UsageError
from cfsp.pipeline import calibrate_source
from cfsp.settings import Budget, CalibrationText, Compute, Part, PruneSettings
from cfsp.text.drawing import draw_text
from tiny_decoders import tiny_model

BLOCKS = 5


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=BLOCKS))


def settings(text_file: Path, budget: Budget) -> PruneSettings:
    text = CalibrationText((str(text_file),), samples=4, seqlen=32)
    return PruneSettings(budget, text=text, compute=Compute("cpu", "float32"))


def test_the_best_of_all_numbers_is_chosen(
    source: LoadedModel, text_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(text_file, Budget(0.4, parts=("ffn", "blocks"), multiple=8))
    engine = engine_of(asked.compute, source)
    windows = draw_text(asked.text, tokenizer)
    statistics = calibrate_source(source, tokenizer, asked.text, asked.compute)
    tried: list[Trial] = []
    original = removal_trial.tried

    def note(*args: Any) -> list[Trial]:
        tried.extend(original(*args))
        return tried

    monkeypatch.setattr(removal_trial, "tried", note)
    with temporary_workplace(None) as place:
        chosen, measured = with_removal_count(source, statistics, windows, asked, engine, place)
    best = min(tried, key=lambda trial: trial.divergence)
    assert (chosen.budget.remove_blocks, chosen.budget.sparsity) == (best.count, best.sparsity)
    assert [trial.count for trial in tried] == list(range(len(tried)))
    assert measured.sensitivity is not None
    # Blocks and channels together are what was asked for.
    parameters_L = parameters_of_blocks(source)
    for trial in tried:
        gone = sum(parameters_L[each.block] for each in measured.removals[: trial.count])
        assert gone < 0.4 * sum(parameters_L) + max(parameters_L) / 2
        assert trial.sparsity > 0 or trial.count == BLOCKS * 2 // 5


def tried(*divergences: float, parts: tuple[Part, ...] = ("ffn",)) -> list[Trial]:
    removed = [RemovedWhole(tuple(range(count))) for count, _ in enumerate(divergences)]
    return [
        Trial(count, removed[count], parts, 0.1, each) for count, each in enumerate(divergences)
    ]


def test_few_are_worth_a_repair_of_each_choice_of_channels() -> None:
    channels = tried(0.9, 0.8, 0.7, 0.6, 0.65)
    both = tried(0.3, 0.4, parts=("ffn", "kv"))
    few = worth_a_repair([*channels, *both])
    assert [(each.count, each.parts) for each in few] == [
        (0, ("ffn",)), (1, ("ffn",)), (3, ("ffn",)), (0, ("ffn", "kv")),
    ]  # fmt: skip


def test_what_was_repaired_is_compared_after_it() -> None:
    trials = tried(0.9, 0.5, 0.4)
    assert best_of(trials) is trials[2]
    trials[0] = replace(trials[0], repaired=0.3)
    trials[1] = replace(trials[1], repaired=0.35)
    assert best_of(trials) is trials[0]


def test_the_number_is_chosen_after_repair(
    source: LoadedModel, text_file: Path, tokenizer: Any
) -> None:
    asked = settings(text_file, Budget(0.5, parts=("ffn", "blocks"), multiple=8))
    engine = engine_of(asked.compute, source)
    windows = draw_text(asked.text, tokenizer)
    statistics = calibrate_source(source, tokenizer, asked.text, asked.compute)

    def divergence(best: int) -> Callable[[Statistics, Budget], float]:
        return lambda measured, budget: abs((budget.remove_blocks or 0) - best)

    for best in (0, 2):
        with temporary_workplace(None) as place:
            chosen, _ = with_removal_count(
                source, statistics, windows, asked, engine, place, divergence(best)
            )
        assert chosen.budget.remove_blocks is not None
        assert chosen.budget.remove_blocks <= best


def test_what_goes_together_is_what_was_asked_for(
    source: LoadedModel, text_file: Path, tokenizer: Any
) -> None:
    model = source.model
    smaller = cfsp.prune(
        model, tokenizer, parts="ffn,blocks", sparsity=0.4, multiple=1, data=[text_file],
        samples=4, seqlen=32, device="cpu",
    )  # fmt: skip
    blocks = sum(parameters_of_blocks(source))
    gone = parameter_count(source) - sum(p.numel() for p in smaller.parameters())
    assert gone == pytest.approx(0.4 * blocks, rel=0.02)


def test_more_than_the_channels_own_takes_blocks_too(
    source: LoadedModel, text_file: Path, tokenizer: Any
) -> None:
    smaller = cfsp.prune(
        source.model, tokenizer, parts="ffn,blocks", sparsity=0.75, multiple=1, data=[text_file],
        samples=4, seqlen=32, device="cpu",
    )  # fmt: skip
    assert smaller.config.num_hidden_layers < BLOCKS


def test_a_number_that_was_given_stays(source: LoadedModel, text_file: Path) -> None:
    asked = settings(text_file, Budget(0.2, parts=("ffn", "blocks"), remove_blocks=1))
    nothing: Any = None
    found, _ = with_removal_count(source, nothing, nothing, asked, nothing, nothing)
    assert found is asked


def test_a_model_that_does_not_fit_is_refused(
    source: LoadedModel, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal_order, "follow_divergence", lambda *args: False)
    asked = settings(text_file, Budget(0.2, parts=("ffn", "blocks")))
    nothing: Any = None
    with pytest.raises(UsageError, match="say how many with --set remove_blocks=N"):
        with_removal_count(source, nothing, nothing, asked, nothing, nothing)

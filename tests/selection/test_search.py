"""The search over plans: which candidates there are, how they are scored, which one is taken."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import entries, goal_of_share, job_of
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.decide import decide
from cfsp.errors import BudgetError
from cfsp.pipeline import calibrate_source
from cfsp.planning.allocation import ModelSize, UnitSize
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.make import Planner, model_size
from cfsp.selection import search
from cfsp.selection.constraint import STEPS, highest_step
from cfsp.selection.divergence import (
    MaskedModel,
    dense_predictions,
    few_beginnings,
    in_batches,
    masked_channels,
)
from cfsp.selection.search import (
    FITTED_WINDOWS,
    Scored,
    _best_numbers,
    apart,
    best_of,
    masked_score,
    repaired_scores,
    worth_a_repair,
)
from cfsp.settings import (
    Budget,
    CalibrationText,
    Compute,
    Criterion,
    Part,
    PruneSettings,
    TargetParameters,
)
from cfsp.streaming.work_dir import WorkDir, temporary_work_dir
from cfsp.text.drawing import draw_text
from cfsp.text.windows import Windows
from tiny_models import WIDTH

BLOCKS = 5


def settings(text_file: Path, goal: TargetParameters, **more: Any) -> PruneSettings:
    text = CalibrationText((str(text_file),), samples=4, seqlen=32)
    budget = Budget(parts=("ffn", "blocks"), multiple=8)
    return PruneSettings(budget, text=text, compute=Compute("cpu", "float32"), goal=goal, **more)


def decided(source: WeightSource, asked: PruneSettings, tokenizer: Any) -> Any:
    """Return what is decided on windows of the text, and the facts of its goal."""
    windows = draw_text(asked.text, tokenizer)
    with temporary_work_dir(None) as work_dir:
        return decide(job_of(source, asked, lambda: windows, work_dir=work_dir))


def test_the_best_of_all_numbers_is_chosen(five_blocks, text_file, tokenizer, monkeypatch):
    asked = settings(text_file, goal_of_share(five_blocks.model, ("blocks",), 0.4), repair="none")
    tried: list[Scored] = []
    original = search._all_masked

    def note(*args: Any) -> list[Scored]:
        tried.extend(original(*args))
        return tried

    monkeypatch.setattr(search, "_all_masked", note)
    result, facts = decided(five_blocks, asked, tokenizer)
    best = min(tried, key=lambda each: each.masked).candidate
    assert Candidate.from_json(facts["chosen"]) == best
    assert result.plan.removed_blocks == best.dropped.blocks
    assert result.statistics is not None and result.statistics.sensitivity is not None
    assert [len(each.candidate.dropped) for each in tried] == list(range(len(tried)))
    # Blocks and channels together are what was asked for.
    parameters_L = parameters_of_blocks(five_blocks)
    for each in tried:
        gone = sum(parameters_L[block] for block in each.candidate.dropped.blocks)
        assert gone < 0.4 * sum(parameters_L) + max(parameters_L) / 2
        assert each.candidate.sparsity > 0 or len(each.candidate.dropped) == BLOCKS * 2 // 5


def scored(*divergences: float, parts: tuple[Part, ...] = ("ffn",)) -> list[Scored]:
    return [
        Scored(Candidate(Dropped(tuple(range(count))), 0, parts, 0.1), each)
        for count, each in enumerate(divergences)
    ]


def test_few_are_worth_a_repair_and_what_was_repaired_is_compared_after_it():
    channels = scored(0.9, 0.8, 0.7, 0.6, 0.65)
    both = scored(0.3, 0.4, parts=("ffn", "kv"))
    few = [each.candidate for each in worth_a_repair([*channels, *both])]
    assert [len(each.dropped) for each in few] == [0, 3, 0]
    assert [each.parts for each in few] == [("ffn",), ("ffn",), ("ffn", "kv")]
    few = [each.candidate for each in worth_a_repair(channels)]
    assert [len(each.dropped) for each in few] == [0, 1, 3]
    assert best_of(channels) is channels[3]
    channels[:2] = [replace(channels[0], repaired=0.7), replace(channels[1], repaired=0.75)]
    assert best_of(channels) is channels[0]


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_best_of_many_numbers_is_found_with_few_tries(count, best):
    """Where the divergence falls up to the best number and rises from there."""
    best = min(best, count)
    tried = []

    def score(number: int) -> Scored:
        tried.append(number)
        return replace(scored(0.0)[0], masked=float(abs(number - best)))

    found = _best_numbers([0.0] * count, score)
    assert min(each.masked for each in found) == 0
    assert len(tried) == len(set(tried)) <= 15


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_least_number_that_meets_the_constraint_is_found(count, least):
    least = min(least, count)

    def score(number: int) -> Scored | None:
        return replace(scored(0.0)[0], masked=float(number)) if number >= least else None

    found = _best_numbers([0.0] * count, score)
    assert min(each.masked for each in found) == least


def test_numbers_that_are_worse_alone_than_the_best_are_not_tried():
    tried = []

    def score(number: int) -> Scored:
        tried.append(number)
        return scored(1.0)[0]

    _best_numbers([0.5, 2.0, 3.0], score)
    assert tried == [0, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_number_is_chosen_after_repair(five_blocks, text_file, tokenizer, monkeypatch, sign):
    """None, or the most of those that were worth it."""
    asked = settings(text_file, goal_of_share(five_blocks.model, ("blocks",), 0.5))
    repaired: list[int] = []

    def scores(_job, _planner, candidates: list[Candidate]) -> list[int]:
        repaired.extend(len(candidate.dropped) for candidate in candidates)
        return [sign * number for number in repaired]

    monkeypatch.setattr(search, "repaired_scores", scores)
    _, facts = decided(five_blocks, asked, tokenizer)
    best = min(repaired, key=lambda number: sign * number)
    assert len(facts["chosen"]["dropped"]["blocks"]) == best and (best == 0) == (sign == 1)


def test_highest_step_leaves_a_multiple(source):
    assert highest_step(model_size(source, Budget(multiple=24))) == STEPS * 3 // 4
    for found, way in (
        (model_size(source, Budget(multiple=WIDTH)), "choose a smaller --multiple"),
        (ModelSize((UnitSize(1, 64, part="kv"),), 64), "name other --parts"),
        (model_size(source, Budget(keep=("0", "1", "2"))), "--keep less"),
    ):
        with pytest.raises(BudgetError, match=f"could go; {way}$"):
            highest_step(found)


# A candidate that is tried with its repair.


def windows(count: int, texts: int) -> Windows:
    tokens_NT = torch.arange(count * 8).view(count, 8)
    return Windows(tokens_NT, {f"text {i}": count // texts for i in range(texts)})


@pytest.mark.parametrize(("count", "texts"), [(128, 1), (16, 2), (128, 8), (126, 9), (5, 1)])
def test_it_is_judged_by_other_windows_than_it_is_fitted_to(count, texts):
    fit, judged = apart(windows(count, texts))
    firsts = [{*part.tokens_NT[:, 0].tolist()} for part in (fit, judged)]
    assert not firsts[0] & firsts[1]
    assert 2 <= len(firsts[1]) <= 9
    assert len(firsts[0]) <= FITTED_WINDOWS
    assert len(firsts[0]) >= min(count // 2, FITTED_WINDOWS - texts)


def test_of_many_kinds_of_text_some_are_for_fitting_and_others_for_judging():
    kinds = windows(126, 9)
    found = [{*(part.tokens_NT[:, 0] // (14 * 8)).tolist()} for part in apart(kinds)]
    assert found == [{0, 2, 4, 6, 8}, {1, 3, 5, 7}]
    # Of three windows all are for both.
    assert [len(part.tokens_NT) for part in apart(windows(3, 1))] == [3, 3]


def test_scores_are_those_of_the_plan_and_repair_helps(five_blocks, text_file, tokenizer, tmp_path):
    text = CalibrationText((str(text_file),), samples=16, seqlen=64)
    asked = replace(settings(text_file, TargetParameters(0.9)), text=text)
    drawn, model = draw_text(text, tokenizer), five_blocks.model
    by_angle = replace(asked, criterion=Criterion("angular"))
    statistics = calibrate_source(five_blocks, tokenizer, by_angle)
    planner = Planner.of(five_blocks, statistics, asked.budget, asked.criterion)
    job = job_of(five_blocks, asked, lambda: drawn, work_dir=WorkDir(tmp_path))
    tokens_NT = few_beginnings(drawn).tokens_NT
    masked = MaskedModel(five_blocks, model, in_batches(tokens_NT))
    before = [parameter.clone() for parameter in model.parameters()]

    half = Candidate(parts=("ffn",), sparsity=0.5)
    kept = dict(enumerate(planner.plan(half).kept_channels))
    with torch.inference_mode():
        dense = dense_predictions(model, tokens_NT)
        with masked_channels(five_blocks, model, kept):
            expected = dense.divergence(model)
    found = masked_score(masked, planner, half)
    assert found == pytest.approx(expected, rel=1e-4)
    nothing = Candidate(parts=("ffn",), sparsity=0.0)
    of_half, of_nothing = repaired_scores(job, planner, [half, nothing])
    assert 0 < of_half < found
    assert not entries(tmp_path)
    assert of_nothing == pytest.approx(0, abs=1e-6)
    assert masked_score(masked, planner, nothing) == pytest.approx(0, abs=1e-6)
    assert all(map(torch.equal, before, model.parameters()))


def test_without_room_for_a_second_model_nothing_is_repaired(five_blocks, monkeypatch, caplog):
    monkeypatch.setattr("cfsp.streaming.runtime.available_bytes", lambda: 1000)
    settings = PruneSettings(Budget(), compute=Compute("cpu", "float32"))
    assert not search.can_be_repaired(job_of(five_blocks, settings))
    assert "compared before repair" in caplog.text

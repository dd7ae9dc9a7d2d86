"""The search over plans: which candidates there are, and which one is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cfsp
from builders import job_of
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.reading import LoadedModel, parameter_count
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.decide import decide
from cfsp.errors import BudgetError, UsageError
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.make import model_size
from cfsp.selection import drop_order, search
from cfsp.selection.constraint import STEPS, highest_step, last_that_holds
from cfsp.selection.search import Scored, _best_numbers, best_of, worth_a_repair
from cfsp.settings import Budget, CalibrationText, Compute, Part, PruneSettings, TargetParameters
from cfsp.streaming.work_dir import temporary_work_dir
from cfsp.text.drawing import draw_text
from tiny_decoders import tiny_model
from tiny_models import WIDTH

BLOCKS = 5


@pytest.fixture(scope="module")
def source() -> LoadedModel:
    return LoadedModel(tiny_model("llama", num_hidden_layers=BLOCKS))


def stays_without(source: LoadedModel, share: float) -> TargetParameters:
    """Return the goal by which a share of the blocks' parameters goes."""
    return TargetParameters(1 - share * sum(parameters_of_blocks(source)) / parameter_count(source))


def settings(text_file: Path, goal: TargetParameters, **more: Any) -> PruneSettings:
    text = CalibrationText((str(text_file),), samples=4, seqlen=32)
    budget = Budget(parts=("ffn", "blocks"), multiple=8)
    return PruneSettings(budget, text=text, compute=Compute("cpu", "float32"), goal=goal, **more)


def test_the_best_of_all_numbers_is_chosen(
    source: LoadedModel, text_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(text_file, stays_without(source, 0.4), repair="none")
    windows = draw_text(asked.text, tokenizer)
    tried: list[Scored] = []
    original = search._all_masked

    def note(*args: Any) -> list[Scored]:
        tried.extend(original(*args))
        return tried

    monkeypatch.setattr(search, "_all_masked", note)
    with temporary_work_dir(None) as work_dir:
        result, facts = decide(job_of(source, asked, lambda: windows, work_dir=work_dir))
    best = min(tried, key=lambda each: each.masked).candidate
    assert Candidate.from_json(facts["chosen"]) == best
    assert result.plan.removed_blocks == best.dropped.blocks
    assert result.statistics is not None and result.statistics.sensitivity is not None
    assert [len(each.candidate.dropped) for each in tried] == list(range(len(tried)))
    # Blocks and channels together are what was asked for.
    parameters_L = parameters_of_blocks(source)
    for each in tried:
        gone = sum(parameters_L[block] for block in each.candidate.dropped.blocks)
        assert gone < 0.4 * sum(parameters_L) + max(parameters_L) / 2
        assert each.candidate.sparsity > 0 or len(each.candidate.dropped) == BLOCKS * 2 // 5


def scored(*divergences: float, parts: tuple[Part, ...] = ("ffn",)) -> list[Scored]:
    return [
        Scored(Candidate(Dropped(tuple(range(count))), 0, parts, 0.1), each)
        for count, each in enumerate(divergences)
    ]


def test_few_are_worth_a_repair_of_each_choice_of_channels() -> None:
    channels = scored(0.9, 0.8, 0.7, 0.6, 0.65)
    both = scored(0.3, 0.4, parts=("ffn", "kv"))
    few = [each.candidate for each in worth_a_repair([*channels, *both])]
    assert [(len(each.dropped), each.parts) for each in few] == [
        (0, ("ffn",)), (3, ("ffn",)), (0, ("ffn", "kv")),
    ]  # fmt: skip
    few = [each.candidate for each in worth_a_repair(channels)]
    assert [len(each.dropped) for each in few] == [0, 1, 3]


def test_what_was_repaired_is_compared_after_it() -> None:
    found = scored(0.9, 0.5, 0.4)
    assert best_of(found) is found[2]
    found[0] = replace(found[0], repaired=0.3)
    found[1] = replace(found[1], repaired=0.35)
    assert best_of(found) is found[0]


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_best_of_many_numbers_is_found_with_few_tries(count: int, best: int) -> None:
    """Where the divergence falls up to the best number and rises from there."""
    best = min(best, count)
    tried = []

    def score(number: int) -> Scored:
        tried.append(number)
        return replace(scored(0.0)[0], masked=float(abs(number - best)))

    found = _best_numbers([0.0] * count, score)
    assert min(each.masked for each in found) == 0
    assert len(tried) == len(set(tried)) <= 15


def test_numbers_that_are_worse_alone_than_the_best_are_not_tried() -> None:
    tried = []

    def score(number: int) -> Scored:
        tried.append(number)
        return scored(1.0)[0]

    _best_numbers([0.5, 2.0, 3.0], score)
    assert tried == [0, 1]


@pytest.mark.parametrize("best", [0, 2])
def test_the_number_is_chosen_after_repair(
    source: LoadedModel, text_file: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, best: int
) -> None:
    asked = settings(text_file, stays_without(source, 0.5))
    windows = draw_text(asked.text, tokenizer)

    def score(self: Any, planner: Any, candidate: Candidate) -> float:
        return abs(len(candidate.dropped) - best)

    monkeypatch.setattr(search.RepairedScore, "score", score)
    with temporary_work_dir(None) as work_dir:
        _, facts = decide(job_of(source, asked, lambda: windows, work_dir=work_dir))
    assert len(facts["chosen"]["dropped"]["blocks"]) <= best


@pytest.mark.parametrize("share", [0.4, 0.75])
def test_what_goes_together_is_what_was_asked_for(
    source: LoadedModel, text_file: Path, tokenizer: Any, share: float
) -> None:
    smaller = cfsp.prune(
        source.model, tokenizer, parts="ffn,blocks", goal=stays_without(source, share), multiple=1,
        data=[text_file], samples=4, seqlen=32, device="cpu",
    )  # fmt: skip
    gone = parameter_count(source) - sum(p.numel() for p in smaller.parameters())
    assert gone == pytest.approx(share * sum(parameters_of_blocks(source)), rel=0.02)
    # More than the channels own takes blocks too.
    assert share < 0.5 or smaller.config.num_hidden_layers < BLOCKS


def test_a_model_that_does_not_fit_is_refused(
    source: LoadedModel, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop_order, "fits", lambda *args: False)
    asked = settings(text_file, stays_without(source, 0.2))
    with pytest.raises(UsageError, match="tries how many blocks should go, which requires the"):
        decide(job_of(source, asked))


@given(st.integers(1, 300), st.integers(0, 300))
def test_bisection_finds_the_last_step(highest: int, last: int) -> None:
    asked = []

    def holds(step: int) -> bool:
        asked.append(step)
        return step <= last

    assert last_that_holds(highest, holds) == min(last, highest)
    assert 0 not in asked
    assert len(asked) == len(set(asked)) <= highest.bit_length() + 1


def test_highest_step_leaves_a_multiple(model: Path) -> None:
    size = model_size(open_checkpoint(model))
    assert highest_step(size, Budget(multiple=24)) == STEPS * 3 // 4
    with pytest.raises(BudgetError, match="choose a smaller --multiple"):
        highest_step(size, Budget(multiple=WIDTH))

"""Channels of all blocks compete: FLAP's global threshold against NumPy, and its budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import LoadedModel
from cfsp.pipeline import calibrate_source
from cfsp.planning.allocation import Budget
from cfsp.planning.competition import channels_above_threshold, standardised
from cfsp.planning.fine import read_ffn_weights
from cfsp.planning.make import Criterion, make_plan
from cfsp.settings import CalibrationText, Compute
from tiny_models import BLOCKS, WIDTH, build_tiny_model

FLAP = Criterion("global", "flap")


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return LoadedModel(build_tiny_model("llama"))


@pytest.fixture(scope="module")
def statistics(llama: LoadedModel, tokenizer: object, text_file: Path) -> Statistics:
    text = CalibrationText((str(text_file),), 8, 32, 0)
    return calibrate_source(llama, tokenizer, text, Compute())  # type: ignore[arg-type]


def numpy_kept(source: LoadedModel, statistics: Statistics, total: int) -> list[np.ndarray]:
    """FLAP in a few lines: fluctuation x squared norm, z-scored per block, one threshold."""
    z = []
    for i, block in enumerate(statistics.blocks):
        down = read_ffn_weights(source, i).down_DF.double().numpy()
        mean = block.sum_F.numpy() / block.tokens
        variance = block.sum_of_squares_F.numpy() / block.tokens - mean**2
        score = variance * (down**2).sum(0)
        z.append((score - score.mean()) / score.std())
    threshold = np.sort(np.concatenate(z))[-total]
    return [np.flatnonzero(values >= threshold) for values in z]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_plan_equals_numpy(llama: LoadedModel, statistics: Statistics, sparsity: float) -> None:
    plan = make_plan(llama, statistics, Budget(sparsity, "ffn", 1), FLAP)
    expected = numpy_kept(llama, statistics, round((1 - sparsity) * BLOCKS * WIDTH))
    assert [list(block.kept) for block in plan.blocks] == [list(kept) for kept in expected]
    # The threshold makes widths of its own, or the test would say little.
    assert len(set(plan.kept_widths)) > 1
    assert [b.importance for b in plan.blocks] == [len(kept) / WIDTH for kept in expected]


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.9])
def test_budget_holds_to_one_multiple(
    llama: LoadedModel, statistics: Statistics, sparsity: float
) -> None:
    plan = make_plan(llama, statistics, Budget(sparsity, "ffn", 8), FLAP)
    wanted = (1 - sparsity) * BLOCKS * WIDTH
    assert abs(sum(plan.kept_widths) - wanted) <= 8
    assert all(8 <= width <= WIDTH and width % 8 == 0 for width in plan.kept_widths)


def test_any_channel_score_can_compete(llama: LoadedModel, statistics: Statistics) -> None:
    plans = [
        make_plan(llama, statistics, Budget(0.5, "ffn", 1), Criterion("global", metric))
        for metric in ("flap", "wanda", "relative")
    ]
    assert len({tuple(plan.kept_widths) for plan in plans}) == len(plans)


def test_experts_of_a_block_share_its_width(tokenizer: object, text_file: Path) -> None:
    source = LoadedModel(build_tiny_model("mixtral"))
    text = CalibrationText((str(text_file),), 8, 64, 0)
    statistics = calibrate_source(source, tokenizer, text, Compute())  # type: ignore[arg-type]
    plan = make_plan(source, statistics, Budget(0.5, "ffn", 8), FLAP)
    assert abs(sum(plan.kept_widths) - 0.5 * BLOCKS * WIDTH) <= 8
    assert all(len(block.kept) == block.ffns * block.kept_width for block in plan.blocks)


@given(
    st.lists(st.lists(st.integers(-4, 4), min_size=1, max_size=6), min_size=1, max_size=5),
    st.data(),
)
def test_threshold_takes_exactly_the_strongest(
    scores: list[list[int]], data: st.DataObject
) -> None:
    total = data.draw(st.integers(0, sum(map(len, scores))))
    counts = channels_above_threshold([torch.tensor(s).double() for s in scores], total)
    assert sum(counts) == total
    taken = [sorted(s, reverse=True)[:c] for s, c in zip(scores, counts, strict=True)]
    left = [sorted(s, reverse=True)[c:] for s, c in zip(scores, counts, strict=True)]
    lowest = min((v for values in taken for v in values), default=9)
    assert all(v <= lowest for values in left for v in values)


def test_standardised_scores() -> None:
    score_F = torch.tensor([1.0, 2.0, 3.0, 6.0])
    expected = (score_F.numpy() - 3) / score_F.numpy().std()
    np.testing.assert_allclose(standardised(score_F).numpy(), expected, rtol=1e-6)
    assert standardised(torch.ones(5)).tolist() == [0.0] * 5

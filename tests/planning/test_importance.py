"""Importance of blocks and channels against a few lines of NumPy, and the sums it is made from."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import random_unit_statistics, random_weights, statistics_with_distances
from cfsp.calibration.calibrate import DistanceSum, UnitSums
from cfsp.calibration.observed import BlockStatistics, UnitStatistics
from cfsp.calibration.statistics import Sensitivity
from cfsp.checkpoint.reading import FFNWeights, LoadedModel
from cfsp.planning import importance
from cfsp.planning.allocation import ModelSize
from cfsp.planning.importance import (
    block_distances,
    block_importance,
    channel_scores,
    importance_by,
    importance_of_units,
    strongest_channels,
    weight_norms,
)
from cfsp.settings import CHANNEL_METRICS, Criterion
from tiny_decoders import tiny_model

BATCHES = [(torch.float32, 5), (torch.float32, 2), (torch.bfloat16, 1)]


def numpy_distance(before: np.ndarray, after: np.ndarray) -> float:
    """The definition, in float64, for hidden states of shape (tokens, D)."""
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return float(np.mean(np.arccos(np.clip((before * after).sum(1) / norms, -1, 1)) / np.pi))


def hidden_states(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 10, 16, generator=generator)
    after = before + 0.3 * torch.randn(6, 10, 16, generator=generator)
    return before.to(dtype), after.to(dtype)


@pytest.mark.parametrize(("dtype", "batch"), BATCHES)
def test_distances_equal_numpy_in_batches_of_any_size(dtype, batch):
    before, after = hidden_states(dtype)
    copies = before.clone(), after.clone()
    sums = DistanceSum()
    for start in range(0, 6, batch):
        sums.add(before[start : start + batch], after[start : start + batch])
    expected = numpy_distance(*(x.double().flatten(0, 1).numpy() for x in (before, after)))
    found = BlockStatistics(sums.total, sums.tokens)
    assert found.distance == pytest.approx(expected, rel=1e-5)
    assert sums.tokens == 60
    assert torch.equal(before, copies[0]) and torch.equal(after, copies[1])


def test_a_block_that_changes_nothing_and_a_zero_state_have_finite_distances():
    before, _ = hidden_states()
    before[0, 0] = 0.0
    sums = DistanceSum()
    sums.add(before, before)
    # The zero state has no direction: it counts as orthogonal, the others as unmoved.
    assert sums.total / sums.tokens == pytest.approx(0.5 / 60, abs=1e-3)


def test_importance_is_the_published_sigmoid():
    """The published code sums over 128 x 1024 tokens, divides by 1e4 and centres."""
    distance_L = [0.31, 0.12, 0.08, 0.07, 0.15]
    sums = np.array(distance_L) * 128 * 1024 / 1e4
    expected = 1 / (1 + np.exp(-(sums - sums.mean())))
    assert block_importance(distance_L) == pytest.approx(expected.tolist(), rel=1e-12)
    assert block_importance([0.0, 1e6]) == [0.0, 1.0]  # nothing overflows


def test_equal_widths_are_by_equal_distances():
    statistics = statistics_with_distances([0.2, 0.1, 0.3])
    assert block_distances(statistics, "angular") == [0.2, 0.1, 0.3]
    assert block_distances(statistics, "uniform") == pytest.approx([0.2] * 3)


def test_importance_by_sensitivity_is_that_of_numpy():
    angular_L, divergence_L = [0.2, 0.1, 0.3], (0.4, 0.01, 0.0)
    statistics = replace(
        statistics_with_distances(angular_L), sensitivity=Sensitivity(divergence_L, (0.5,) * 3, 4)
    )
    root = np.sqrt(np.maximum(divergence_L, 0.4e-6))
    np.testing.assert_allclose(importance_by(statistics, "sensitivity"), root / root.max())
    assert importance_by(statistics, "angular") == block_importance(angular_L)
    assert block_distances(statistics, "sensitivity") == angular_L


def test_sensitivity_counts_what_was_really_kept():
    """Of three KV groups two stay: what that costs is half of what a half would."""
    cost = 0.4
    kept_L = (1 / 2, 2 / 3, 1 / 3, 1.0)
    divergence_L = tuple(cost * (1 / k - 1) for k in kept_L)
    sensitivity = Sensitivity(divergence_L, kept_L, 4)
    np.testing.assert_allclose(sensitivity.halved_L, [cost, cost, cost, 0])
    statistics = replace(statistics_with_distances([0.1] * 4), sensitivity=sensitivity)
    np.testing.assert_allclose(importance_by(statistics, "sensitivity")[:3], 1)
    # Blocks that nothing depends on are equally important.
    nothing = replace(sensitivity, divergence_L=(0.0,) * 4)
    assert importance_by(replace(statistics, sensitivity=nothing), "sensitivity") == [1.0] * 4


def test_importance_is_that_of_the_block_and_blocks_without_an_ffn_do_not_count():
    """The last block moves hidden states most, and has nothing that could be pruned."""
    whole = statistics_with_distances([0.1, 0.3, 0.9])
    first, second, _ = whole.units
    statistics = replace(
        whole,
        units=(first, second, second),
        sensitivity=Sensitivity((0.04, 0.16, 0.0), (0.5, 0.5, 1.0), 4),
    )
    assert statistics.blocks_with_units == [0, 1]
    assert block_distances(statistics, "angular") == [0.1, 0.3]
    first, second = block_importance([0.1, 0.3])
    for metric, expected in (("angular", [first, second, second]), ("sensitivity", [0.5, 1, 1])):
        assert importance_of_units(statistics, metric, ModelSize((), 0), ("ffn",))[1] == expected


# Channels.


def numpy_scores(metric: str, statistics: UnitStatistics, weights: FFNWeights) -> np.ndarray:
    """The formulas of the module docstring, loop by loop, in float64."""
    X = np.sqrt(statistics.sum_of_squares_F.numpy())
    down = np.abs(weights.down_DF.double().numpy())
    inputs = [np.abs(w.double().numpy()) for w in (weights.up_FD, weights.gate_FD) if w is not None]
    F, D = len(X), down.shape[0]
    if metric == "activation":
        return X
    share = np.zeros(F)
    for j in range(D):
        share += down[j] * X / (down[j] * X).sum()
    for w in inputs:
        if metric == "eq8":
            # Within a channel: every channel's terms sum to one.
            share += np.array([(w[i] / w[i].sum()).sum() for i in range(F)])
        else:
            for j in range(D):
                share += w[:, j] / w[:, j].sum()
    return share * X


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("metric", CHANNEL_METRICS)
def test_scores_equal_numpy(metric, gate):
    statistics, weights = random_unit_statistics(24), random_weights(10, 24, gate=gate)
    expected = numpy_scores(metric, statistics, weights)
    scores_F = channel_scores(metric, statistics, weights)
    assert scores_F.dtype == torch.float32
    np.testing.assert_allclose(scores_F.numpy(), expected, rtol=2e-5)
    by_weights = np.linalg.norm(weights.down_DF.double().numpy(), axis=0)
    np.testing.assert_allclose(weight_norms(weights).numpy(), by_weights, rtol=2e-5)


@pytest.mark.parametrize("metric", CHANNEL_METRICS)
def test_dead_channels_and_rows_of_zeros_give_no_nan_and_go_first(metric):
    statistics, weights = random_unit_statistics(24), random_weights(10, 24)
    assert weights.gate_FD is not None
    statistics.sum_of_squares_F[5] = 0.0
    weights.down_DF[:, 5] = 0.0
    weights.down_DF[3] = 0.0
    weights.up_FD[:, 2] = 0.0
    scores_F = channel_scores(metric, statistics, weights)
    assert torch.isfinite(scores_F).all()
    assert 5 not in strongest_channels(scores_F, 23)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_strongest_channels_are_the_highest_scores(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    kept = strongest_channels(torch.tensor(scores, dtype=torch.float32), count)
    # Ties go to lower indices: a stable sort by falling score.
    expected = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])
    assert kept == expected


# The sums that the scores are made from.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_many_tokens_keep_their_precision(dtype):
    """A float32 running sum would stall: 1 + 2^24 x 1 is not representable there.

    That they are those of plain hooks architecture_contract.py checks.
    """
    sums, small = UnitSums(), 1 + 2**-7
    sums.add(torch.full((1, 1, 1), 4096.0, dtype=dtype))
    sums.add(torch.full((5, 130, 1), small, dtype=dtype))  # more than are added at once
    assert sums.sum_of_squares_F is not None
    assert sums.sum_of_squares_F.item() == 4096.0**2 + 650 * small**2


def test_a_unit_that_keeps_all_is_not_scored(monkeypatch):
    source = LoadedModel(tiny_model("llama"), ("ffn", "kv"))
    monkeypatch.setattr(importance, "read_ffn_weights", lambda *_: pytest.fail("nothing to choose"))
    for unit in source.units:
        observed = random_unit_statistics(unit.columns)
        kept = importance.choose_channels(source, unit, observed, unit.width, Criterion())
        assert kept == tuple(range(unit.width))

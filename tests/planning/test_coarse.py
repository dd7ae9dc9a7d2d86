"""Coarse importance against NumPy, and the distances against their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import statistics_with_distances
from cfsp.calibration.calibrate import DistanceSum
from cfsp.calibration.observed import BlockStatistics
from cfsp.calibration.statistics import Sensitivity
from cfsp.planning.importance import block_distances, block_importance, importance_by, of_units


def numpy_distance(before: np.ndarray, after: np.ndarray) -> float:
    """The definition, in float64, for hidden states of shape (tokens, D)."""
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    return float(np.mean(np.arccos(np.clip((before * after).sum(1) / norms, -1, 1)) / np.pi))


def hidden_states(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(6, 10, 16, generator=generator)
    after = before + 0.3 * torch.randn(6, 10, 16, generator=generator)
    return before.to(dtype), after.to(dtype)


@pytest.mark.parametrize(
    ("dtype", "batch"), [(torch.float32, 6), (torch.float32, 4), (torch.bfloat16, 1)]
)
def test_distances_equal_numpy_in_batches_of_any_size(dtype, batch):
    before, after = hidden_states(dtype)
    copies = before.clone(), after.clone()
    sums = DistanceSum()
    for start in range(0, 6, batch):
        sums.add(before[start : start + batch], after[start : start + batch])
    expected = numpy_distance(
        before.double().flatten(0, 1).numpy(), after.double().flatten(0, 1).numpy()
    )
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


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=80))
def test_importance_is_ordered_like_distance_and_never_overflows(distance_L):
    importance_L = block_importance(distance_L)
    assert all(0 <= s <= 1 for s in importance_L)
    order = np.argsort(distance_L, kind="stable")
    assert np.all(np.diff(np.array(importance_L)[order]) >= -1e-12)


def test_equal_widths_are_by_equal_distances():
    statistics = statistics_with_distances([0.2, 0.1, 0.3])
    assert block_distances(statistics, "angular") == [0.2, 0.1, 0.3]
    assert block_distances(statistics, "uniform") == pytest.approx([0.2] * 3)


def test_importance_by_sensitivity_is_that_of_numpy():
    angular_L, divergence_L = [0.2, 0.1, 0.3], (0.4, 0.01, 0.0)
    statistics = replace(
        statistics_with_distances(angular_L),
        sensitivity=Sensitivity(divergence_L, (0.5,) * 3, 4),
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


def test_blocks_that_nothing_depends_on_are_equally_important():
    statistics = replace(
        statistics_with_distances([0.2, 0.1]),
        sensitivity=Sensitivity((0.0, 0.0), (0.5, 0.5), 4),
    )
    assert importance_by(statistics, "sensitivity") == [1.0, 1.0]


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
    importance_U = of_units(statistics, importance_by(statistics, "angular"))
    assert importance_U[1] == importance_U[2]
    assert importance_U[:2] == block_importance([0.1, 0.3])
    assert of_units(statistics, importance_by(statistics, "sensitivity")) == [0.5, 1.0, 1.0]

"""Standard errors are those of NumPy's own formulas, and of many repeated draws."""

from __future__ import annotations

import numpy as np
import pytest

from cfsp.quality.paired import (
    Estimate,
    difference,
    geometric_mean,
    mean,
    mean_of_tasks,
    per_count,
)


def oracle(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Mean of second - first, and its standard error."""
    gap = second - first
    return float(gap.mean()), float(gap.std(ddof=1) / np.sqrt(len(gap)))


@pytest.fixture
def draws() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    first = generator.random(50)
    return first, first + 0.1 * generator.standard_normal(50)


def test_mean_and_paired_difference(draws):
    first, second = draws
    found = mean(difference(list(first), list(second)))
    assert (found.value, found.stderr) == pytest.approx(oracle(first, second))
    # In pairs what both have in common cancels.
    apart = np.hypot(*(each.std(ddof=1) / np.sqrt(50) for each in draws))
    assert found.stderr is not None and found.stderr < 0.5 * apart


def test_windows_of_many_lengths_vary_as_said():
    generator = np.random.default_rng(1)
    values, errors = [], []
    for _ in range(2000):
        counts = generator.integers(10, 100, 40)
        # Tokens of one window share what makes it easy or hard.
        sums = counts * (2 + 0.3 * generator.standard_normal(40))
        found = per_count(list(sums), list(counts))
        values.append(found.value)
        errors.append(found.stderr)
    assert np.mean(values) == pytest.approx(2, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)


def test_mean_over_tasks_has_the_error_of_independent_ones():
    found = mean_of_tasks([Estimate(1.0, 0.3), Estimate(2.0, 0.4)])
    assert (found.value, found.stderr) == pytest.approx((1.5, np.hypot(0.3, 0.4) / 2))
    assert mean_of_tasks([Estimate(1.0, 0.3), Estimate(2.0, None)]).stderr is None
    assert mean([1.0]) == Estimate(1.0, None)
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2)

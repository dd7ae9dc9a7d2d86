from __future__ import annotations

import time

import pytest
import torch

from cfsp.errors import UsageError
from cfsp.recovery.schedule import Limit, RunClock, rate_factor

CPU = torch.device("cpu")


def test_the_rate_rises_then_falls_to_zero():
    rates = [rate_factor(f / 100, 0.1) for f in range(101)]
    assert rates[10] == pytest.approx(1.0)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[0] > 0


def test_exactly_one_limit():
    with pytest.raises(UsageError, match="found 0 of them"):
        Limit()
    with pytest.raises(UsageError, match="found 2 of them"):
        Limit(steps=1, minutes=1)
    with pytest.raises(UsageError, match="must be positive and below 1,000,000,000, found -1"):
        Limit(steps=-1)


def test_epochs_become_steps():
    assert Limit(epochs=2.5).in_steps(windows=100, windows_in_step=8) == 31
    assert Limit(steps=7).in_steps(100, 8) == 7
    assert Limit(minutes=1).in_steps(100, 8) is None


def test_a_clock_of_steps_does_not_depend_on_time():
    clock = RunClock(40, None, time.monotonic() - 1000)
    clock.update(10, CPU)
    assert clock.fraction == 0.25
    assert clock.seconds_left == pytest.approx(3000, rel=0.01)


def test_a_clock_of_seconds_leaves_time_for_the_last_evaluation_and_never_runs_back():
    clock = RunClock(None, 100.0, time.monotonic() - 40)
    clock.update(1, CPU)
    assert clock.fraction == pytest.approx(0.4, abs=0.01)
    clock.reserved_seconds = 20
    clock.update(2, CPU)
    assert clock.fraction == pytest.approx(0.5, abs=0.01)
    clock.reserved_seconds = 0
    clock.update(3, CPU)
    assert clock.fraction >= 0.5
    clock.continue_from(70)
    clock.update(4, CPU)
    assert clock.fraction == 1.0

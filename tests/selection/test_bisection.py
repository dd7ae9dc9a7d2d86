"""Bisection over sparsities."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.errors import BudgetError
from cfsp.planning.make import model_size
from cfsp.selection.constraint import STEPS, highest_step, last_that_holds
from cfsp.settings import (
    Budget,
)
from tiny_models import WIDTH


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


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

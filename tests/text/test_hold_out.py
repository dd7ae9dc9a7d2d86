"""Which windows repair is judged by: some of every text, always the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.text.hold_out import HELD_OUT_WINDOWS, is_held_out
from cfsp.text.windows import Windows


@given(st.lists(st.integers(2, 64), min_size=1, max_size=6))
def test_every_text_is_held_out_in_part_and_fitted_in_part(parts: list[int]) -> None:
    mask_N = is_held_out(parts)
    assert len(mask_N) == sum(parts)
    for part_N in torch.split(mask_N, parts):
        assert part_N.any()
        assert not part_N.all()
    assert int(mask_N.sum()) <= HELD_OUT_WINDOWS + len(parts)


@pytest.mark.parametrize(
    ("windows", "expected"),
    [(2, [1]), (16, [7, 15]), (32, [7, 15, 23, 31]), (64, [15, 31, 47, 63]), (65, [16, 33, 50])],
)
def test_one_text_holds_out_every_eighth_and_about_four(windows: int, expected: list[int]) -> None:
    stride = min(windows, max(8, -(-windows // 4)))
    (by_formula,) = np.nonzero(np.arange(windows) % stride == stride - 1)
    assert by_formula.tolist() == expected
    assert is_held_out([windows]).nonzero().flatten().tolist() == expected


def test_a_text_that_would_have_none_holds_out_its_last() -> None:
    assert is_held_out([3, 3]).nonzero().flatten().tolist() == [2, 5]
    windows = Windows(torch.zeros(6, 4, dtype=torch.int64), {"a": 3, "b": 3})
    assert windows.held_out_N.nonzero().flatten().tolist() == [2, 5]
    # Few of the windows that were drawn: of which texts they are is not known any more.
    few = Windows(windows.tokens_NT[:4], windows.sources)
    assert few.held_out_N.nonzero().flatten().tolist() == [3]

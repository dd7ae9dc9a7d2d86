"""Which windows repair is judged by: some of every text, always the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.text.windows import HELD_OUT_WINDOWS, Windows, held_out_documents, is_held_out


@settings(max_examples=30)
@given(st.lists(st.integers(2, 64), min_size=1, max_size=6))
def test_every_text_is_held_out_in_part_and_fitted_in_part(parts):
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
def test_one_text_holds_out_every_eighth_and_about_four(windows, expected):
    assert is_held_out([windows]).nonzero().flatten().tolist() == expected


def test_a_text_that_would_have_none_holds_out_its_last():
    assert is_held_out([3, 3]).nonzero().flatten().tolist() == [2, 5]
    windows = Windows(torch.zeros(6, 4, dtype=torch.int64), {"a": 3, "b": 3})
    assert windows.held_out_N.nonzero().flatten().tolist() == [2, 5]
    # Few of the windows that were drawn: of which texts they are is not known any more.
    few = Windows(windows.tokens_NT[:4], windows.sources)
    assert few.held_out_N.nonzero().flatten().tolist() == [3]


@settings(max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=80), st.integers(1, 400))
def test_held_out_documents_have_as_many_tokens_as_asked_and_at_most_one_more(sizes, least):
    held = [size for size, own in zip(sizes, held_out_documents(sizes, least), strict=True) if own]
    assert sum(held) >= min(least, sum(sizes))
    assert sum(held) < least + max(sizes, default=0) or not sum(sizes)


def test_held_out_documents_are_at_equal_distances():
    held = held_out_documents([10] * 100, 30)
    assert [number for number, own in enumerate(held) if own] == [33, 66, 99]

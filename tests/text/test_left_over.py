"""Windows that calibration leaves over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cfsp.errors import TextError
from drawn_windows import draw_windows, windows_left_over


def test_left_over_windows_are_those_that_calibration_does_not_see(
    tokenizer: Any, text_file: Path, other_text_file: Path
) -> None:
    names = [str(text_file), str(other_text_file)]
    drawn = draw_windows(names, tokenizer, samples=9, seqlen=16, seed=3)
    left = windows_left_over(names, tokenizer, samples=9, seqlen=16, seed=3, count=7)
    assert left.sources == {names[0]: 4, names[1]: 3}
    seen = {tuple(window) for window in drawn.tokens_NT.tolist()}
    assert not seen & {tuple(window) for window in left.tokens_NT.tolist()}
    again = windows_left_over(names, tokenizer, samples=9, seqlen=16, seed=3, count=7)
    assert torch.equal(left.tokens_NT, again.tokens_NT)


def test_texts_that_have_no_windows_left(tokenizer: Any, text_file: Path) -> None:
    name = str(text_file)
    have = len(draw_windows([name], tokenizer, samples=None, seqlen=512).tokens_NT)
    with pytest.raises(TextError, match=rf"calibration takes {have}; 2 others.*--held-out"):
        windows_left_over([name], tokenizer, samples=None, seqlen=512, seed=0, count=2)


def test_windows_left_of_a_text_that_is_named_twice(tokenizer: Any, text_file: Path) -> None:
    names = [str(text_file)] * 2
    drawn = draw_windows(names, tokenizer, samples=4, seqlen=16, seed=0)
    left = windows_left_over(names, tokenizer, samples=4, seqlen=16, seed=0, count=3)
    both = [tuple(row) for row in [*drawn.tokens_NT.tolist(), *left.tokens_NT.tolist()]]
    assert len(set(both)) == 7 and left.sources == {names[0]: 3}

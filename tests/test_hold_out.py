"""The hold-out rule: some of every text of a mixture, never all of it."""

from __future__ import annotations

import pytest
import torch

from cfsp.text.hold_out import HELD_OUT_WINDOWS, is_held_out
from cfsp.text.windows import Windows, draw_windows, few_windows


def text_of_windows(windows: int, texts: int) -> torch.Tensor:
    """Which text each window is of, as `draw_windows` lays a mixture out: one after the other."""
    shares = [windows // texts + (i < windows % texts) for i in range(texts)]
    return torch.repeat_interleave(torch.arange(texts), torch.tensor(shares))


def missed(windows: int, texts: int) -> bool:
    """Whether the rule holds nothing of some text out."""
    held_out = text_of_windows(windows, texts)[is_held_out(windows)]
    return len(held_out.unique()) < texts


@pytest.mark.parametrize("texts", [2, 3, 4])
def test_every_text_of_a_mixture_is_held_out_in_part(texts: int) -> None:
    # Four texts share four windows exactly, so that all is right only where N is a multiple of 4.
    step = 4 if texts == 4 else 1
    assert not [n for n in range(8 * texts, 257, step) if missed(n, texts)]


@pytest.mark.parametrize(("windows", "texts"), [(8, 2), (16, 3), (16, 4), (34, 4), (255, 4)])
@pytest.mark.xfail(strict=True, reason="too few held-out windows for so many texts")
def test_small_or_uneven_mixtures_are_held_out_in_part(windows: int, texts: int) -> None:
    assert not missed(windows, texts)


def test_most_windows_are_fitted_to() -> None:
    for windows in range(8, 257):
        assert 1 <= int(is_held_out(windows).sum()) <= max(HELD_OUT_WINDOWS, windows // 8)


def test_a_mixture_is_laid_out_text_after_text(tokenizer, text_file, other_text_file):
    names = [str(text_file), str(other_text_file)]
    drawn = draw_windows(names, tokenizer, samples=17, seqlen=32)
    assert drawn.sources == {names[0]: 9, names[1]: 8}
    alone = draw_windows(names[:1], tokenizer, samples=9, seqlen=32)
    assert torch.equal(drawn.tokens_NT[:9], alone.tokens_NT)


def test_few_windows_have_their_share_of_every_text() -> None:
    tokens_NT = text_of_windows(32, 4)[:, None].expand(32, 2)
    few = few_windows(Windows(tokens_NT, {}), 8)
    assert few.tokens_NT[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]

"""The width search: same sum, never further from the dense model, the same for the same windows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp.errors import UnsupportedModelError
from cfsp.whole_model.divergence import dense_predictions
from cfsp.whole_model.masks import masked_channels
from cfsp.whole_model.width_search import promising_shifts, search_widths, shifted
from tiny_models import VOCABULARY, WIDTH, build_tiny_model

MULTIPLE = 8
START = [48, 48, 48]


def first_channels(block: int, width: int) -> Sequence[int]:
    return range(width)


def random_tokens(windows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (windows, 12), generator=generator)


def model_with_an_idle_block() -> torch.nn.Module:
    """The FFN of the last block does nothing: all of its channels are free to go."""
    model = build_tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    return model


def test_the_search_takes_from_an_idle_block() -> None:
    model, tokens_NT = model_with_an_idle_block(), random_tokens(3)
    passes: list[None] = []
    found = search_widths(
        model, tokens_NT, first_channels, START, MULTIPLE, 6, lambda: passes.append(None)
    )
    assert sum(found.kept_L) == sum(START)
    assert all(MULTIPLE <= kept <= WIDTH for kept in found.kept_L)
    assert all(kept % MULTIPLE == 0 for kept in found.kept_L)
    assert found.kept_L[2] < START[2]
    assert found.after < 0.9 * found.before
    with torch.inference_mode():
        dense = [dense_predictions(model, tokens_T[None]) for tokens_T in tokens_NT]
        kept = {block: range(width) for block, width in enumerate(found.kept_L)}
        with masked_channels(model, kept):
            expected = sum(one.divergence(model) for one in dense) / 3
    assert found.after == pytest.approx(expected, rel=1e-6)
    divergences = [found.before, *(entry["divergence"] for entry in found.rounds)]
    assert divergences == sorted(divergences, reverse=True)
    assert len(passes) >= 3 * 7


def test_the_same_windows_give_the_same_widths() -> None:
    tokens_NT = random_tokens(2, seed=1)
    found = [
        search_widths(build_tiny_model("gpt2"), tokens_NT, first_channels, START, MULTIPLE, 3)
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0].after <= found[0].before


def test_no_round_and_no_room_leave_the_start() -> None:
    model, tokens_NT = build_tiny_model("llama"), random_tokens(1)
    found = search_widths(model, tokens_NT, first_channels, START, MULTIPLE, 0)
    assert found.kept_L == START
    assert found.before == found.after
    full = [WIDTH] * 3
    found = search_widths(model, tokens_NT, first_channels, full, MULTIPLE, 5)
    assert found.kept_L == full
    assert found.after == pytest.approx(0, abs=1e-6)


costs = st.lists(st.one_of(st.none(), st.floats(-1, 1)), min_size=1, max_size=12)


@given(costs, st.data())
def test_shifts_gain_and_use_each_block_once(
    give_L: list[float | None], data: st.DataObject
) -> None:
    size = len(give_L)
    get_L = data.draw(
        st.lists(st.one_of(st.none(), st.floats(-1, 1)), min_size=size, max_size=size)
    )
    shifts = promising_shifts(give_L, get_L)
    used = [block for shift in shifts for block in (shift.giver, shift.receiver)]
    assert len(set(used)) == len(used)
    for shift in shifts:
        cost, gain = give_L[shift.giver], get_L[shift.receiver]
        assert cost is not None and gain is not None
        assert shift.gain == gain - cost > 0
    widths = shifted([100] * size, shifts, 10)
    assert sum(widths) == 100 * size


def test_the_best_pair_comes_first() -> None:
    shifts = promising_shifts([0.1, 0.5, None, 0.3], [0.0, 0.4, 0.9, None])
    assert [(shift.giver, shift.receiver) for shift in shifts] == [(0, 2), (3, 1)]


def test_experts_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mixtures of experts"):
        search_widths(build_tiny_model("mixtral"), random_tokens(1), first_channels, START, 8, 1)

"""Allocation: the published rule against NumPy, and the budget at every size and multiple."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cfsp.errors import BudgetError, UsageError
from cfsp.planning.allocation import (
    ModelSize,
    UnitSize,
    allocate,
    channels_to_keep,
    round_widths,
    shrunk,
    water_fill,
)
from cfsp.planning.importance import block_importance
from cfsp.planning.make import multiples
from cfsp.settings import Budget, Clamp

WIDTHS = (11008, 14336, 1536, 4864, 8960, 18944)
MULTIPLES = (1, 32, 64, 128, 256)

distances = st.lists(st.floats(0.01, 0.6), min_size=2, max_size=48)


def numpy_keep(importance_L: list[float], p: float) -> np.ndarray:
    """The published rule: proportional, and shrunk about the mean where a block would overflow."""
    s = np.array(importance_L)
    keep = s / s.mean() * (1 - p)
    if keep.max() >= 1:
        shrink = (s.mean() * (1 / (1 - p) - 1)) / (s.max() - s.mean()) / 1.05
        s = (s - s.mean()) * shrink + s.mean()
        keep = s / s.mean() * (1 - p)
    return keep


def model_of(width: int, blocks: int, multiple: int) -> ModelSize:
    """A Llama-shaped model: hidden size and attention in the usual ratio to the FFN."""
    hidden = width * 3 // 8
    ffn = 3 * hidden * width
    return ModelSize(
        (UnitSize(width, 3 * hidden, multiple),) * blocks,
        blocks * (ffn + 4 * hidden**2) + 32000 * hidden,
    )


@given(distances, st.floats(0.01, 0.95))
def test_shrunk_importances_give_the_published_rule(distance_L, p):
    importance_L = block_importance(distance_L)
    # Where all blocks matter alike the published code divides zero by zero.
    assume(max(importance_L) - min(importance_L) > 1e-6)
    ones = [1] * len(distance_L)
    keep_L = water_fill(shrunk(importance_L, p), ones, ones, (1 - p) * len(ones), [0] * len(ones))
    np.testing.assert_allclose(keep_L, numpy_keep(importance_L, p), rtol=1e-9)
    assert np.mean(keep_L) == pytest.approx(1 - p)
    assert max(keep_L) < 1


@given(
    distances,
    st.floats(0.0, 0.8),
    st.sampled_from(WIDTHS),
    st.sampled_from(MULTIPLES),
    st.booleans(),
)
def test_equal_widths_are_within_half_a_multiple(distance_L, p, width, multiple, first_stays):
    """What is told to stay keeps all, and the others pay for it."""
    budget = Budget(p, widths="equal")
    size, blocks = model_of(width, len(distance_L), multiple), len(distance_L)
    size = replace(size, units=(replace(size.units[0], stays=first_stays), *size.units[1:]))
    share = ((1 - p) * blocks - first_stays) / (blocks - first_stays)
    assume(share * width >= multiple)  # so little goes that a multiple stays of each width
    first, *others = allocate(block_importance(distance_L), budget, size)
    assert {first, *others} == {width if first_stays else others[0], others[0]}
    assert others[0] % multiple == 0 or others[0] == width
    assert abs(others[0] - share * width) <= multiple / 2 + 1e-6


@given(
    st.lists(st.tuples(st.floats(1e-4, 1.0), st.integers(1, 20000)), min_size=1, max_size=48),
    st.floats(0.0, 1.0),
    st.integers(0, 2000),
)
def test_water_filling_meets_the_total_within_bounds(blocks, keep, multiple):
    importance_L, width_L = [b[0] for b in blocks], [b[1] for b in blocks]
    least_L = [min(multiple, width) for width in width_L]
    total = sum(least_L) + keep * (sum(width_L) - sum(least_L))
    kept_L = water_fill(importance_L, width_L, [1] * len(width_L), total, least_L)
    assert sum(kept_L) == pytest.approx(total, abs=1e-6 * sum(width_L))
    bounds = zip(least_L, kept_L, width_L, strict=True)
    assert all(least <= kept <= width for least, kept, width in bounds)
    # Between the bounds all have the same c; by it a whole block would have more, one of the least
    # width less.
    rows = list(zip(kept_L, importance_L, width_L, least_L, strict=True))
    free = [k / (s * w) for k, s, w, least in rows if least < k < w]
    if free:
        assert max(free) == pytest.approx(min(free))
        assert all(max(free) * s >= 1 - 1e-9 for k, s, w, least in rows if least < k == w)
        assert all(min(free) * s * w <= k * (1 + 1e-9) for k, s, w, least in rows if k == least < w)


def test_the_least_of_some_units_is_paid_for_by_all_others():
    """And not by those alone that stay whole, which are due more than all they have."""
    size = ModelSize((UnitSize(1024, 96, 64),) * 5, 10**6)
    kept_U = allocate([1.0, 0.9, 0.3, 0.001, 0.001], Budget(0.5), size, "water-fill")
    assert kept_U == [1024, 1024, 384, 64, 64]


def test_what_channels_cannot_lose_goes_of_the_kv_groups():
    size = ModelSize((UnitSize(32, 96, 32),) * 4 + (UnitSize(8, 4096, part="kv"),) * 4, 10**6)
    kept_U = allocate([1.0] * 8, Budget(0.25, parts=("ffn", "kv")), size)
    assert size.cost_of(kept_U) == pytest.approx(0.75 * size.cost_of(size.width_U), abs=64)


@given(distances, st.floats(0.05, 0.9), st.sampled_from(WIDTHS))
def test_clamps_differ_only_where_a_block_would_overflow(distance_L, sparsity, width):
    size, budget = model_of(width, len(distance_L), 1), Budget(sparsity)
    importance_L = block_importance(distance_L)
    highest = max(importance_L) / np.mean(importance_L) * (1 - sparsity)
    assume(abs(highest - 1) > 1e-6)
    filled_L = allocate(importance_L, budget, size, "water-fill")
    published_L = allocate(importance_L, budget, size, "published")
    assert abs(sum(filled_L) - sum(published_L)) <= 1
    if highest < 1:
        # To the channel that goes to whoever lost most, where remainders are equal.
        assert np.abs(np.array(filled_L) - np.array(published_L)).max() <= 1
    else:
        assert max(filled_L) == width


def test_largest_remainder_gives_to_those_who_lost_most():
    for total, expected in ((160.0, [32, 64, 64]), (128.0, [32, 64, 32])):
        ideal = [40.0, 61.0, 59.0]
        assert round_widths(ideal, [96, 96, 96], [1, 1, 1], [32, 32, 32], total) == expected


@pytest.mark.parametrize("width", WIDTHS)
def test_impossible_budget_names_what_can_be_reached(width):
    size = model_of(width, 4, 128)
    with pytest.raises(BudgetError) as caught:
        allocate([0.5] * 4, Budget(0.9999), size)
    match = re.search(r"between 0 and ([\d.]+)% can be removed", str(caught.value))
    assert match, str(caught.value)
    highest = float(match[1]) / 100
    expected = (width - 128) / width
    assert expected - 0.001 < highest <= expected
    # What the message promises is possible, and so is the edge.
    for sparsity in (highest, expected):
        assert min(allocate([0.5] * 4, Budget(sparsity), size)) >= 128


@pytest.mark.parametrize(
    ("width", "multiple"),
    [(11008, 256), (8192, 256), (8191, 128), (4096, 128), (4095, 64), (1536, 64), (1023, 32)],
)
def test_multiple_is_chosen_by_width(width, multiple):
    assert Budget(0.5).multiple_for([width, width]) == multiple
    assert Budget(0.5, multiple=7).multiple_for([width]) == 7


# Units of different kinds: channels of one own many times what those of another do.

KINDS = {"mlp": 1, "mlp.experts": 64, "mlp.shared_expert": 1}
# Of a model: no unit is told to stay, or any may be.
STAYING = st.sampled_from([st.just(False), st.booleans()])


@st.composite
def mixed_sizes(draw: st.DrawFn) -> tuple[ModelSize, list[float]]:
    """Return a model of up to two units in a block, and the importance of each."""
    width_of = {kind: draw(st.integers(40, 9000)) for kind in KINDS}
    multiple_of = {kind: draw(st.sampled_from(MULTIPLES[1:])) for kind in KINDS}
    experts, stays = draw(st.integers(2, 128)), draw(STAYING)
    units, importance_U = [], []
    for _ in range(draw(st.integers(1, 12))):
        importance = draw(st.floats(0.01, 1.0))
        for kind in draw(
            st.sampled_from([("mlp",), ("mlp.experts", "mlp.shared_expert"), ("mlp.experts",), ()])
        ):
            cost = 96 * (experts if kind == "mlp.experts" else 1)
            grain = 8 if kind == "mlp.experts" else 1
            sizes = width_of[kind], cost, multiple_of[kind], grain
            units.append(UnitSize(*sizes, stays=draw(stays)))
            importance_U.append(importance)
    assume(units)
    ffn = sum(unit.width * unit.channel_parameters for unit in units)
    return ModelSize(tuple(units), 2 * ffn), importance_U


@st.composite
def plain_sizes(draw: st.DrawFn) -> tuple[ModelSize, list[float]]:
    """Return a model of one unit in a block, pruned before or of equal blocks."""
    equal = st.tuples(st.sampled_from(WIDTHS), st.integers(2, 48)).map(lambda d: [d[0]] * d[1])
    width_L = draw(st.lists(st.integers(40, 3000), min_size=2, max_size=40) | equal)
    distances = st.lists(st.floats(0.01, 0.6), min_size=len(width_L), max_size=len(width_L))
    stays = draw(STAYING)
    multiple = draw(st.sampled_from(MULTIPLES))
    units = tuple(UnitSize(width, 96, multiple, stays=draw(stays)) for width in width_L)
    return ModelSize(units, 200 * sum(width_L)), block_importance(draw(distances))


@given(
    plain_sizes() | mixed_sizes(),
    st.floats(0.0, 0.95),
    st.sampled_from(get_args(Clamp)),
)
def test_a_budget_is_met_to_one_multiple_in_parameters(drawn, sparsity, clamp):
    size, importance_U = drawn
    budget = Budget(sparsity)
    try:
        channels_to_keep(budget, size)
    except (BudgetError, UsageError):
        assume(False)
    kept_U = allocate(importance_U, budget, size, clamp)
    assert sparsity or kept_U == size.width_U

    for unit, kept in zip(size.units, kept_U, strict=True):
        assert unit.least <= kept <= unit.width
        assert kept % unit.multiple == 0 or kept == unit.width
        assert kept % unit.grain == 0 or kept == unit.width
        assert kept == unit.width or not unit.stays
    ffn = sum(unit.width * unit.channel_parameters for unit in size.units)
    removed = size.parameters - size.parameters_with(kept_U)
    dearest = max(unit.multiple * unit.channel_parameters for unit in size.units)
    assert abs(removed - sparsity * ffn) <= dearest


def test_units_of_one_kind_share_a_multiple_and_kinds_do_not():
    """Or a width, where widths are equal. An attention may have the path of an FFN."""
    widths = [("mlp", 2000), ("mlp.experts", 768), ("mlp", 900), ("mlp.experts", 512)]
    ffns = [SimpleNamespace(path=path, width=width, part="ffn") for path, width in widths]
    architecture = SimpleNamespace(of_part=lambda _: SimpleNamespace(units=ffns))
    units = [*ffns, SimpleNamespace(path="mlp", width=4, part="kv")]
    source: Any = SimpleNamespace(units=units, architecture=architecture)
    assert multiples(source, Budget(0.5)) == [64, 32, 64, 32, 1]
    assert multiples(source, Budget(0.5, multiple=8)) == [8] * 4 + [1]
    units = (UnitSize(768, 3 * 64 * 8, 32), UnitSize(2048, 3 * 64, 64)) * 2
    kept_U = allocate([0.9, 0.1, 0.2, 0.3], Budget(0.5, widths="equal"), ModelSize(units, 10**7))
    assert kept_U == [384, 1024, 384, 1024]


def test_equal_shares_of_unlike_widths_go_down_to_the_least():
    """A quarter of 7 groups is nearer to two than to the one that must stay."""
    units = tuple(UnitSize(width, 64, part="kv") for width in (7, 3, 2))
    budget = Budget(0.75, parts=("kv",), widths="equal")
    assert allocate([0.2, 0.3, 0.4], budget, ModelSize(units, 10**6)) == [1, 1, 1]


def test_widths_of_mixed_units_follow_importance():
    """What is equally important keeps the same share, whatever its channels own."""
    units = (UnitSize(1024, 128, 8, grain=8), UnitSize(4096, 1, 8))
    size = ModelSize(units * 2, 10**9)
    kept_U = allocate([0.4, 0.4, 0.6, 0.6], Budget(0.5), size)
    share_U = [kept / unit.width for kept, unit in zip(kept_U, size.units, strict=True)]
    assert share_U == pytest.approx([0.4, 0.4, 0.6, 0.6], abs=8 / 1024)


def test_cheap_units_do_not_make_up_for_costly_ones():
    """One dense FFN beside many experts: it stays within a multiple of its share."""
    units = (UnitSize(512, 1, 32), *[UnitSize(512, 128, 32)] * 3)
    size = ModelSize(units, 10**9)
    for sparsity in (0.3, 0.33, 0.41, 0.5, 0.62):
        kept_U = allocate([0.5] * 4, Budget(sparsity), size)
        assert abs(kept_U[0] - (1 - sparsity) * 512) <= 32

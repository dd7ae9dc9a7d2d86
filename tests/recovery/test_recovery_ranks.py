from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import CALIBRATION, CRITERION
from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.errors import PlanError, UsageError
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.recovery.settings import Adaptation
from cfsp.recovery.targets import allocate_ranks, ranks_of

importances = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=60)


@given(importances, st.integers(1, 64), st.sampled_from(["importance", "uniform", "inverse"]))
def test_the_total_is_kept_and_no_block_is_without(importance_L, rank, allocation):
    ranks_L = allocate_ranks(importance_L, rank, allocation)
    assert sum(ranks_L) == rank * len(importance_L)
    assert min(ranks_L) >= 1


@given(importances, st.integers(1, 64))
def test_order_follows_importance_or_its_inverse(importance_L, rank):
    by_importance = allocate_ranks(importance_L, rank, "importance")
    inverse = allocate_ranks(importance_L, rank, "inverse")
    for a in range(len(importance_L)):
        for b in range(len(importance_L)):
            if importance_L[a] > importance_L[b]:
                assert by_importance[a] >= by_importance[b]
                assert inverse[a] <= inverse[b]


def test_proportional_where_no_rounding_is_needed():
    assert allocate_ranks([0.1, 0.2, 0.3], 8, "importance") == [4, 8, 12]
    assert allocate_ranks([0.1, 0.2, 0.3], 8, "uniform") == [8, 8, 8]
    assert allocate_ranks([1 / 3, 1 / 2, 1.0], 2, "inverse") == [3, 2, 1]


def test_a_fractional_mean_is_rounded_in_total():
    assert sum(allocate_ranks([0.5] * 4, 2.25, "uniform")) == 9


def test_a_missing_importance_is_an_error():
    with pytest.raises(UsageError, match="--rank-allocation uniform"):
        allocate_ranks([0.5, 0.0], 4, "importance")


def test_blocks_without_an_ffn_get_the_mean_importance(tmp_path):
    units = [UnitPlan(block, 8, (0, 1), 0.1, importance, path="mlp")
             for block, importance in ((0, 0.2), (2, 0.6), (2, 0.6))]  # fmt: skip
    plan = PruningPlan(ModelIdentity("m", "llama", "f"), CRITERION, CALIBRATION, tuple(units))
    plan.save(tmp_path / PLAN_FILE)
    of_ffns = SimpleNamespace(units=units)
    architecture = SimpleNamespace(block_count=3, of_part=lambda part: of_ffns)
    source = SimpleNamespace(directory=tmp_path, architecture=architecture, label="m")
    assert ranks_of(source, Adaptation(rank=10, allocation="importance")) == [5, 10, 15]
    of_ffns.units = units[:2]
    with pytest.raises(PlanError, match=r"describes 3 FFNs, the model has 2 in 3 blocks"):
        ranks_of(source, Adaptation(rank=10, allocation="importance"))

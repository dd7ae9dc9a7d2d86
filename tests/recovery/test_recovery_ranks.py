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


@given(importances, st.integers(1, 64))
def test_the_total_is_kept_no_block_is_without_and_more_important_ones_have_no_less(
    importance_L, rank
):
    ranks_L = allocate_ranks(importance_L, rank)
    assert sum(ranks_L) == rank * len(importance_L)
    assert min(ranks_L) >= 1
    by_importance = [found for _, found in sorted(zip(importance_L, ranks_L, strict=True))]
    assert by_importance == sorted(by_importance)


def test_proportional_where_no_rounding_is_needed():
    assert allocate_ranks([0.1, 0.2, 0.3], 8) == [4, 8, 12]
    assert sum(allocate_ranks([0.5] * 4, 2.25)) == 9


def test_blocks_without_an_ffn_get_the_mean_importance(tmp_path):
    units = [UnitPlan(block, 8, (0, 1), 0.1, importance, path="mlp")
             for block, importance in ((0, 0.2), (2, 0.6), (2, 0.6))]  # fmt: skip
    plan = PruningPlan(ModelIdentity("m", "llama", "f"), CRITERION, CALIBRATION, tuple(units))
    plan.save(tmp_path / PLAN_FILE)
    of_ffns = SimpleNamespace(units=units)
    architecture = SimpleNamespace(block_count=3, of_part=lambda part: of_ffns)
    source = SimpleNamespace(directory=tmp_path, architecture=architecture, label="m")
    for allocation, expected in (
        ("importance", [5, 10, 15]), ("inverse", [16, 8, 6]), ("uniform", [10, 10, 10]),
    ):  # fmt: skip
        assert ranks_of(source, Adaptation(rank=10, allocation=allocation)) == expected
    of_ffns.units = units[:2]
    with pytest.raises(PlanError, match=r"describes 3 FFNs, the model has 2 in 3 blocks"):
        ranks_of(source, Adaptation(rank=10, allocation="importance"))
    units[0] = UnitPlan(0, 8, (0, 1), 0.1, 0.0, path="mlp")
    PruningPlan(ModelIdentity("m", "llama", "f"), CRITERION, CALIBRATION, tuple(units[:2])).save(
        tmp_path / PLAN_FILE
    )
    with pytest.raises(UsageError, match=r"found 0\.0; use --rank-allocation uniform"):
        ranks_of(source, Adaptation(rank=10, allocation="importance"))

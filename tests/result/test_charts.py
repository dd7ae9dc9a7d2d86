"""The chart by block and its caption; blocks with several FFN units, or none."""

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from builders import CALIBRATION, CRITERION, plan_of
from cfsp.planning.unit_plan import UnitPlan
from cfsp.result.card import Origin, model_card
from cfsp.result.facts import NOTHING
from cfsp.result.page.by_block import block_chart
from cfsp.result.page.chart import NARROW
from cfsp.result.runs import RunFacts
from cfsp.settings import BLOCK_METRICS, DIVERGENCE, RUNS, removal_in_words, worth_in_words
from report_runs import FITTED

EXPERTS, SHARED = "mlp.experts", "mlp.shared_expert"
SEVERAL = (
    UnitPlan(0, 12, tuple(range(6)), 0.2, 0.5, path="mlp"),
    UnitPlan(1, 4, (0, 1, 4, 5, 8, 9), 0.3, 0.75, 3, path=EXPERTS, cost=3),
    UnitPlan(1, 8, (0, 1, 2, 3, 4), 0.3, 0.75, path=SHARED),
)
# The second block has none.
GAPS = (SEVERAL[0], replace(SEVERAL[0], block=2, distance=0.25))
REJECTED = FITTED | {"error_after": 0.5, "kept": False, "strength": None}


def run_of(units: tuple[UnitPlan, ...], entries: list[Any]) -> RunFacts:
    plan = plan_of(*units)
    manifest = {
        "base_model": asdict(plan.model),
        "ffn_channels": {"before": 24, "after": 13},
        "parameters_before": 1000,
        "parameters_after": 997,
        "ffn_sparsity": plan.ffn_sparsity,
        "model_sparsity": 0.25,
        "command": "cfsp prune",
        "criterion": CRITERION,
        "calibration": CALIBRATION,
        "versions": {},
        "repair": {"steps": [{"name": "ridge", "blocks": entries}]},
    }
    return RunFacts("run", Path("run"), manifest, (), plan)


def several() -> RunFacts:
    places = [{"block": unit.block, "path": unit.path} for unit in SEVERAL]
    kinds = (FITTED, FITTED, REJECTED)
    return run_of(SEVERAL, [p | kind for p, kind in zip(places, kinds, strict=True)])


def test_a_chart_has_a_column_for_every_unit():
    names = ["0 mlp", f"1 {EXPERTS} (3)", f"1 {SHARED}"]
    chart = block_chart([several()])
    assert [row[0] for row in chart.table.rows] == names
    drawing = chart.draw(920)
    for name in names:
        assert f"Block {name}: keeps" in drawing
    assert drawing.count('class="kept"') == 3
    # Below the columns stand their blocks.
    assert ">2</text>" not in drawing


def planned(name: str = "run", removed: tuple[int, ...] = (), **criterion: Any) -> RunFacts:
    """Return a run of two blocks that lose channels, or of which one goes whole."""
    units = [UnitPlan(block, 4, (0, 1), 0.25 + block, 0.5 + block / 2) for block in range(2)]
    if removed:
        units = [replace(u, kept=() if u.block in removed else tuple(range(4))) for u in units]
    return RunFacts(name, Path(name), {}, (), plan_of(*units, removed=removed, **criterion))


LARGEST = "Importance is relative to the largest."
SENSITIVE = {"block_metric": "sensitivity"}


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([planned()], ("further they turn the hidden state", "is the mean angle between")),
        ([planned(block_metric="uniform")], ("Blocks count alike", "is the mean angle between")),
        # By an earlier version.
        ([planned(block_metric="mse")], ("of their FFN channels by mse.", "is the mean angle")),
        ([planned("a", **SENSITIVE), planned("b", **SENSITIVE)], ("Blocks keep more", LARGEST)),
        (
            [planned(removed=(1,), removal="divergence", parts=["blocks"])],
            ("No FFN channels go", "those without which its predictions change least", "angle"),
        ),
        (
            [planned("a", **SENSITIVE), planned("b")],
            ("a: Blocks keep more", "further the predictions move", "b: Blocks keep more", LARGEST),
        ),
    ],
)
def test_a_caption_is_of_the_criterion_of_the_plan(runs, said):
    chart = block_chart(runs)
    places = [chart.caption.find(each) for each in said]
    assert -1 not in places and places == sorted(places), chart.caption
    assert ("a: " in chart.caption) == (len(said) == 4)
    assert len(runs) == 1 or "a: FFN channels that stay" in chart.draw(920)
    shown = "Importance" if LARGEST in said else "Distance between input and output"
    assert f'class="panel" x="52" y="14">{shown}</text>' in chart.draw(920)


def test_experts_that_went_are_told_as_experts():
    """Those that stay keep all their channels."""
    chart = block_chart([run_of((replace(SEVERAL[1], kept=(4, 5, 6, 7)),), [None])])
    assert f"Block 1 {EXPERTS} (3): keeps 1 of 3 experts (33%)" in chart.draw(920)
    assert "No FFN channels go from what stays. Experts stay by router weight" in chart.caption


def test_every_criterion_has_its_words():
    for metric in BLOCK_METRICS:
        said = worth_in_words(metric, "Blocks", "FFN channels")
        assert metric == "uniform" or "keep more of their FFN channels the further" in said
    assert len({removal_in_words(removal) for removal in (DIVERGENCE, RUNS, "")}) == 3


def test_a_block_without_an_ffn_has_an_empty_column():
    chart = block_chart([run_of(GAPS, [FITTED, None, REJECTED])])
    assert [row[0] for row in chart.table.rows] == ["0 mlp", "1", "2 mlp"]
    assert chart.table.rows[1][1:] == [NOTHING] * 4
    drawing = chart.draw(920)
    assert "Block 1: no FFN" in drawing
    assert drawing.count('class="kept"') == 2


def test_a_card_names_units_and_says_what_the_share_is_of():
    run = several()
    card = model_card(run.manifest, run.plan, Origin("m"))
    assert f"| 1 {EXPERTS} (3) | 0.3000 | 0.750 | 4 | 2 |" in card
    assert "of FFN parameters" in card
    assert "rejected in block 1 mlp.shared_expert)" in card


def test_a_long_heading_is_broken_on_a_phone():
    chart = block_chart([planned(f"{'very-' * 8}{name}") for name in ("long", "name")])
    lines = re.findall(r'class="panel"[^>]*>([^<]*)<', chart.draw(NARROW))
    assert len(lines) > 3 and max(map(len, lines)) <= 48
    assert chart.draw(920).count('class="panel"') == 3

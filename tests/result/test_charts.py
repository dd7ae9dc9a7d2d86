"""Charts by block and their captions; models whose blocks have several FFN units, or none."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from builders import CALIBRATION, CRITERION
from cfsp.errors import ReportError
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.result.card import Origin, model_card
from cfsp.result.facts import NOTHING
from cfsp.result.manifest import write_manifest
from cfsp.result.page.block_chart import block_chart
from cfsp.result.page.repair_chart import repair_chart
from cfsp.result.runs import RunFacts, read_run
from cfsp.settings import (
    BLOCK_METRICS,
    DIVERGENCE,
    RUNS,
    removal_in_words,
    worth_in_words,
)

EXPERTS, SHARED = "mlp.experts", "mlp.shared_expert"
SEVERAL = (
    UnitPlan(0, 12, tuple(range(6)), 0.2, 0.5, path="mlp"),
    UnitPlan(1, 4, (0, 1, 4, 5, 8, 9), 0.3, 0.75, 3, path=EXPERTS, cost=3),
    UnitPlan(1, 8, (0, 1, 2, 3, 4), 0.3, 0.75, path=SHARED),
)
# The second block has none.
GAPS = (SEVERAL[0], replace(SEVERAL[0], block=2, distance=0.25))
FITTED = {"blocks": 1, "error_before": 0.5, "error_after": 0.25, "kept": True, "strength": 0.1,
          "training_steps": 0}  # fmt: skip
REJECTED = {**FITTED, "error_after": 0.5, "kept": False, "strength": None}


def run_of(units: tuple[UnitPlan, ...], entries: list[Any], name: str = "run") -> RunFacts:
    plan = PruningPlan(ModelIdentity("m", "qwen2_moe", "f"), CRITERION, CALIBRATION, units)
    manifest = {
        "base_model": asdict(plan.model),
        "widths_before": [unit.width for unit in units],
        "intermediate_sizes": plan.kept_widths,
        "parameters_before": 1000,
        "parameters_after": 1000 - len(name),
        "ffn_sparsity": plan.ffn_sparsity,
        "model_sparsity": 0.25,
        "command": "cfsp prune",
        "criterion": CRITERION,
        "calibration": CALIBRATION,
        "versions": {},
        "repair": {"steps": [{"name": "ridge", "blocks": entries}]},
    }
    return RunFacts(name, Path(name), manifest, (), plan)


def several(name: str = "run") -> RunFacts:
    places = [{"block": unit.block, "path": unit.path} for unit in SEVERAL]
    kinds = (FITTED, FITTED, REJECTED)
    return run_of(SEVERAL, [p | kind for p, kind in zip(places, kinds, strict=True)], name)


def gaps(name: str = "run") -> RunFacts:
    return run_of(GAPS, [FITTED, None, REJECTED], name)


def test_a_chart_has_a_column_for_every_unit() -> None:
    names = ["0 mlp", f"1 {EXPERTS} (3)", f"1 {SHARED}"]
    chart = block_chart([several()])
    assert chart is not None
    assert [row[0] for row in chart.table.rows] == names
    drawing = chart.draw(920)
    for name in names:
        assert f"Block {name}: keeps" in drawing
    assert drawing.count('class="kept"') == 3
    # Below the columns stand their blocks.
    assert ">2</text>" not in drawing
    repaired = repair_chart([several()])
    assert repaired is not None
    assert [row[0] for row in repaired.table.rows] == ["0 mlp", f"1 {EXPERTS}", f"1 {SHARED}"]
    assert f"Block 1 {SHARED}, ridge: error 0.5000 before" in repaired.draw(920)


def planned(name: str = "run", removed: tuple[int, ...] = (), **criterion: Any) -> RunFacts:
    """Return a run of two blocks that lose channels, or of which one goes whole."""
    units = [UnitPlan(block, 4, (0, 1), 0.25 + block, 0.5 + block / 2) for block in range(2)]
    if removed:
        units = [
            replace(unit, kept=() if unit.block in removed else tuple(range(4))) for unit in units
        ]
    plan = PruningPlan(
        ModelIdentity("m", "llama", "f"), CRITERION | criterion, CALIBRATION, tuple(units), removed
    )
    return RunFacts(name, Path(name), {}, (), plan)


ANGLE = "Distance is the mean angle between a block's input and output, in half turns."
LARGEST = "Importance is relative to the largest."


@pytest.mark.parametrize(
    ("runs", "caption"),
    [
        (
            [planned()],
            "Blocks keep more of their FFN channels the further they turn the hidden state. "
            f"{ANGLE}",
        ),
        ([planned(block_metric="uniform")], f"Blocks count alike. {ANGLE}"),
        (
            [planned(block_metric="mse")],  # by an earlier version
            f"Blocks keep more of their FFN channels by mse. {ANGLE}",
        ),
        (
            [planned("a", block_metric="sensitivity"), planned("b", block_metric="sensitivity")],
            "Blocks keep more of their FFN channels the further the predictions move when one "
            f"alone loses about half of them. {LARGEST}",
        ),
        (
            [planned(removed=(1,), removal="divergence", parts=["blocks"])],
            "No FFN channels go from what stays. The blocks that the model lost are those without "
            f"which its predictions change least. {ANGLE}",
        ),
        (
            [planned("a", block_metric="sensitivity"), planned("b")],
            "a: Blocks keep more of their FFN channels the further the predictions move when one "
            "alone loses about half of them. b: Blocks keep more of their FFN channels the further "
            f"they turn the hidden state. {LARGEST}",
        ),
    ],
)
def test_a_caption_is_of_the_criterion_of_the_plan(runs: list[RunFacts], caption: str) -> None:
    chart = block_chart(runs)
    assert chart is not None
    assert chart.caption == caption
    assert len(runs) == 1 or "a: FFN channels that stay" in chart.draw(920)
    shown = "Importance" if caption.endswith(LARGEST) else "Distance between input and output"
    assert f'class="panel" x="52" y="14">{shown}</text>' in chart.draw(920)


def test_every_criterion_has_its_words() -> None:
    for metric in BLOCK_METRICS:
        said = worth_in_words(metric, "Blocks", "FFN channels")
        assert metric == "uniform" or "keep more of their FFN channels the further" in said
    assert len({removal_in_words(removal) for removal in (DIVERGENCE, RUNS, "")}) == 3


def test_a_block_without_an_ffn_has_an_empty_column() -> None:
    chart = block_chart([gaps()])
    assert chart is not None
    assert [row[0] for row in chart.table.rows] == ["0 mlp", "1", "2 mlp"]
    assert chart.table.rows[1][1:] == [NOTHING] * 4
    drawing = chart.draw(920)
    assert "Block 1: no FFN" in drawing
    assert drawing.count('class="kept"') == 2
    repaired = repair_chart([gaps()])
    assert repaired is not None
    assert "Block 1, ridge: no error of its own" in repaired.draw(920)


def test_a_card_names_units_and_says_what_the_share_is_of() -> None:
    run = several()
    card = model_card(run.manifest, run.plan, Origin("m"))
    assert f"| 1 {EXPERTS} (3) | 0.3000 | 0.750 | 4 | 2 |" in card
    assert "of FFN parameters" in card
    assert "(rejected in block 1 mlp.shared_expert)" in card


@pytest.mark.parametrize(
    ("run", "wrong"),
    [
        (several(), [FITTED, FITTED, REJECTED]),
        (several(), [{**FITTED, "block": 0, "path": "mlp"}] * 3),
        (gaps(), [FITTED, None]),
    ],
)
def test_steps_that_do_not_fit_the_plan_are_refused(
    run: RunFacts, wrong: list[Any], tmp_path: Path
) -> None:
    assert run.plan is not None
    run.plan.save(tmp_path / "cfsp_plan.json")
    write_manifest(tmp_path, run.manifest)
    assert read_run(tmp_path).plan == run.plan
    write_manifest(tmp_path, {**run.manifest, "repair": {"steps": [
        {"name": "ridge", "blocks": wrong}]}})  # fmt: skip
    with pytest.raises(ReportError, match="they are of different runs"):
        read_run(tmp_path)

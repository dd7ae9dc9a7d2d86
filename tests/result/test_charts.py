"""Charts by block and of repair, and their captions; blocks with several FFN units, or none."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from builders import CALIBRATION, CRITERION
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.result.card import Origin, model_card
from cfsp.result.facts import NOTHING
from cfsp.result.making import steps_in_words
from cfsp.result.page.by_block import block_chart, repair_chart
from cfsp.result.page.chart import NARROW
from cfsp.result.runs import RunFacts, read_run
from cfsp.settings import BLOCK_METRICS, DIVERGENCE, RUNS, removal_in_words, worth_in_words
from report_runs import BETTER, DIVERGED, FITTED, WORSE, changed_copy

EXPERTS, SHARED = "mlp.experts", "mlp.shared_expert"
SEVERAL = (
    UnitPlan(0, 12, tuple(range(6)), 0.2, 0.5, path="mlp"),
    UnitPlan(1, 4, (0, 1, 4, 5, 8, 9), 0.3, 0.75, 3, path=EXPERTS, cost=3),
    UnitPlan(1, 8, (0, 1, 2, 3, 4), 0.3, 0.75, path=SHARED),
)
# The second block has none.
GAPS = (SEVERAL[0], replace(SEVERAL[0], block=2, distance=0.25))
REJECTED = FITTED | {"error_after": 0.5, "kept": False, "strength": None}


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
    repaired = repair_chart([several()])
    assert [row[0] for row in repaired.table.rows] == ["0 mlp", f"1 {EXPERTS}", f"1 {SHARED}"]
    assert f"Block 1 {SHARED}, ridge: error 0.5000 before" in repaired.draw(920)


def test_what_is_told_of_a_block_stands_at_its_last_unit_with_its_number():
    run = several()
    run.repair_steps.append({"name": "sequential", "blocks": [BETTER, WORSE]})
    drawing = repair_chart([run]).draw(920)
    for said in (
        "0, sequential: error 0.5000",
        "1, sequential: no error of",
        "1, sequential: error",
    ):
        assert f"Block {said}" in drawing
    assert "Block 2, sequential" not in drawing


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


def test_every_criterion_has_its_words():
    for metric in BLOCK_METRICS:
        said = worth_in_words(metric, "Blocks", "FFN channels")
        assert metric == "uniform" or "keep more of their FFN channels the further" in said
    assert len({removal_in_words(removal) for removal in (DIVERGENCE, RUNS, "")}) == 3


def test_a_block_without_an_ffn_has_an_empty_column():
    chart = block_chart([gaps()])
    assert [row[0] for row in chart.table.rows] == ["0 mlp", "1", "2 mlp"]
    assert chart.table.rows[1][1:] == [NOTHING] * 4
    drawing = chart.draw(920)
    assert "Block 1: no FFN" in drawing
    assert drawing.count('class="kept"') == 2
    repaired = repair_chart([gaps()])
    assert "Block 1, ridge: no error of its own" in repaired.draw(920)


def test_a_card_names_units_and_says_what_the_share_is_of():
    run = several()
    card = model_card(run.manifest, run.plan, Origin("m"))
    assert f"| 1 {EXPERTS} (3) | 0.3000 | 0.750 | 4 | 2 |" in card
    assert "of FFN parameters" in card
    assert "rejected in block 1 mlp.shared_expert)" in card


def repaired(*entries: Any, name: str = "local", run: str = "run") -> RunFacts:
    steps = [{"name": name, "blocks": list(entries)}] if entries else []
    return RunFacts(run, Path(run), {"repair": {"steps": steps}})


def chart_of(*runs: RunFacts) -> Any:
    return repair_chart(runs)


def test_a_run_has_a_panel_for_every_step(run, tmp_path):
    local = {"name": "local", "blocks": [BETTER, None, WORSE]}
    copy = changed_copy(run, tmp_path / "copy", lambda m: m["repair"]["steps"].append(local))
    facts = read_run(copy)
    assert [step["name"] for step in facts.repair_steps] == ["ridge", "local"]
    chart = chart_of(facts)
    drawing = chart.draw(920)
    titles = re.findall(r'class="panel"[^>]*>([^<]*)<', drawing)
    assert "Ridge: relative squared error of the output" in titles[0]
    assert "Local: relative error of the hidden states" in titles[1]
    entries = [entry for step in facts.repair_steps for entry in step["blocks"]]
    assert drawing.count('class="before"') == sum(entry is not None for entry in entries)
    assert len(chart.table.rows) == 3
    cells = [cell for row in chart.table.rows for cell in row]
    for entry in entries:
        if entry is not None:
            assert f"{entry['error_before']:.6f}" in cells


def test_what_was_kept_and_what_was_rejected():
    run = repaired(BETTER, WORSE, DIVERGED)
    chart = chart_of(run)
    assert chart.table.head == ["block", "local, before", "after", "outcome"]
    assert chart.table.rows == [
        ["0", "0.500000", "0.250000", "kept, 1,200 training steps"],
        ["1", "0.125000", "7.500000", "rejected, 100 training steps"],
        ["2", "0.375000", "NaN", "rejected, 100 training steps"],
    ]
    drawing = chart.draw(920)
    assert drawing.count('class="before"') == 3 and drawing.count('class="after"') == 1
    assert drawing.count('class="rejected"') == 2
    assert "error 0.3750 before, NaN after, rejected" in drawing
    # What was rejected does not stretch the scale.
    assert max(map(float, re.findall(r'class="tick end"[^>]*>([\d.]+)<', drawing))) <= 0.6
    assert [swatch for swatch, _ in chart.legend] == ["before", "after", "rejected"]
    errors = "error of hidden states 0.333 to 0.250"
    assert steps_in_words(run.repair_steps) == f"local ({errors}, rejected in blocks 1, 2)"


def test_a_fit_says_how_strong_it_was():
    chart = chart_of(repaired(FITTED, FITTED, FITTED, name="ridge"))
    assert chart.table.rows[0][3] == "kept, strength 0.3"
    assert [swatch for swatch, _ in chart.legend] == ["before", "after"]


def test_blocks_that_changed_together_share_a_mark():
    chart = chart_of(repaired(None, None, BETTER | {"blocks": 3}))
    assert [row[1:] for row in chart.table.rows[:2]] == [[NOTHING] * 3] * 2
    drawing = chart.draw(920)
    assert drawing.count('class="before"') == drawing.count('class="after"') == 1
    # They can still be pointed at: the other charts show the same block then.
    assert drawing.count('class="hit"') == 3
    assert drawing.count("shares the error of block 2") == 2
    assert drawing.count('class="stick"') == 2
    assert "share one error, measured after the last of them" in chart.caption


def test_an_error_that_grew_and_was_kept_is_explained():
    grew = BETTER | {"error_after": 0.75}
    explained = "judged by the model's predictions"
    assert explained in chart_of(repaired(BETTER, BETTER, grew)).caption
    assert explained not in chart_of(repaired(BETTER, BETTER, WORSE)).caption


def test_words_of_single_blocks():
    assert "Block 2, local: no error of its own" in chart_of(repaired(BETTER, BETTER, None)).draw(
        400
    )
    experts = [{"kept": True}, {"kept": False}, {"kept": True}]
    drawing = chart_of(repaired(FITTED | {"experts": experts}, FITTED, FITTED)).draw(920)
    assert "0.2500 after, rejected in 1 of 3 experts" in drawing


def test_several_runs_share_a_scale():
    runs = [
        repaired(BETTER, BETTER, BETTER, run="one"),
        repaired(BETTER, BETTER | {"error_before": 2.0}, None, run="two"),
        repaired(run="three"),
    ]
    chart = chart_of(*runs)
    assert chart.table.head[1] == "one: local, before" and len(chart.table.head) == 7
    drawing = chart.draw(920)
    assert "two: local: relative error" in drawing and "three" not in drawing
    assert re.findall(r'class="tick end"[^>]*>([\d.]+)<', drawing).count("2") == 2


def test_a_long_heading_is_broken_on_a_phone():
    runs = [repaired(BETTER, run=f"{'very-' * 8}{name}") for name in ("long", "name")]
    lines = re.findall(r'class="panel"[^>]*>([^<]*)<', chart_of(*runs).draw(NARROW))
    assert len(lines) == 4 and max(map(len, lines)) <= 48
    assert chart_of(*runs).draw(920).count('class="panel"') == 2


@pytest.mark.parametrize(
    "repair", [{"steps": []}, {"steps": [{"name": "bias", "blocks": []}]}, None]
)
def test_runs_without_errors_have_no_chart(repair):
    assert repair_chart([RunFacts("run", Path("run"), {"repair": repair})]) is None


def test_what_kept_all_its_channels_was_not_rejected():
    whole = BETTER | {"error_before": 0.0, "error_after": 0.0, "kept": False, "training_steps": 0}
    (zeros,) = chart_of(repaired(whole, whole, name="ridge")).panels
    assert zeros.grid[-1] == (1.0, "1")
    chart = chart_of(repaired(whole, BETTER, BETTER, name="ridge"))
    drawing = chart.draw(920)
    assert 'class="rejected"' not in drawing and drawing.count('class="before"') == 3
    assert "Block 0, ridge: nothing was cut" in drawing
    assert chart.table.rows[0][3] == "nothing was cut"
    assert [swatch for swatch, _ in chart.legend] == ["before", "after"]

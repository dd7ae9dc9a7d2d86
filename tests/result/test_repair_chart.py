"""The chart of repair: what it draws of each step, and what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cfsp.result.facts import NOTHING
from cfsp.result.making import steps_in_words
from cfsp.result.page.chart import NARROW
from cfsp.result.page.repair_chart import repair_chart
from cfsp.result.runs import RunFacts, read_run
from report_runs import BETTER, DIVERGED, FITTED, WORSE, changed_copy


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
    assert "Ridge: relative squared error of the FFN output" in titles[0]
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
    assert [entry.swatch for entry in chart.legend] == ["before", "after", "rejected"]
    assert steps_in_words(run.repair_steps) == "local (rejected in blocks 1, 2)"


def test_a_fit_says_how_strong_it_was():
    chart = chart_of(repaired(FITTED, FITTED, FITTED, name="ridge"))
    assert chart.table.rows[0][3] == "kept, strength 0.3"
    assert [entry.swatch for entry in chart.legend] == ["before", "after"]


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


def test_errors_of_zero_can_be_drawn():
    none = WORSE | {"error_before": 0, "error_after": 0.0}
    assert chart_of(repaired(none, none, none)).table.rows[0][1:3] == ["0.000000", "0.000000"]


def test_what_kept_all_its_channels_was_not_rejected():
    whole = BETTER | {"error_before": 0.0, "error_after": 0.0, "kept": False, "training_steps": 0}
    chart = chart_of(repaired(whole, BETTER, BETTER, name="ridge"))
    drawing = chart.draw(920)
    assert 'class="rejected"' not in drawing and drawing.count('class="before"') == 3
    assert "Block 0, ridge: nothing was cut" in drawing
    assert chart.table.rows[0][3] == "nothing was cut"
    assert [entry.swatch for entry in chart.legend] == ["before", "after"]

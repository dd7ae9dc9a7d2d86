"""The report on repair: what it draws of each step, what it tolerates, what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import ReportError
from cfsp.report.chart import Chart
from cfsp.report.repair_chart import repair_chart
from cfsp.report.reproduction import reproduction
from cfsp.report.runs import read_run
from cfsp.report.summary import NOTHING
from cfsp.report.write import write_report
from cfsp.settings import Budget
from report_runs import changed_copy, prune_tiny

Change = Callable[[dict[str, Any]], None]
BETTER = {"blocks": 1, "error_before": 0.5, "error_after": 0.25, "kept": True, "strength": None,
          "training_steps": 1200}  # fmt: skip
WORSE = BETTER | {"error_before": 0.125, "error_after": 7.5, "kept": False, "training_steps": 100}
DIVERGED = WORSE | {"error_before": 0.375, "error_after": None}
FITTED = BETTER | {"strength": 0.3, "training_steps": 0}


@pytest.fixture(scope="module")
def ridge(tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repair") / "ridge"
    return prune_tiny(tiny_checkpoint("llama"), text_file, out, budget=Budget(0.5, multiple=8))


def repaired(*entries: Any, name: str = "local") -> Change:
    """Give a manifest one step of repair."""
    return lambda manifest: manifest.update(
        repair={"steps": [{"name": name, "blocks": list(entries)}]}
    )


def chart_of(*runs: Path) -> Chart:
    chart = repair_chart([read_run(run) for run in runs])
    assert chart is not None
    return chart


def test_a_real_run_has_a_panel_for_every_step(
    tiny_checkpoint: Any, text_file: Path, tmp_path: Path
) -> None:
    steps = ["ridge", "sequential", "local"]
    run = prune_tiny(
        tiny_checkpoint("llama"),
        text_file,
        tmp_path / "run",
        budget=Budget(0.5, multiple=8),
        repair="local",
    )
    facts = read_run(run)
    assert [step["name"] for step in facts.repair_steps] == steps
    chart = chart_of(run)
    drawing = chart.draw(920)
    titles = re.findall(r'class="panel"[^>]*>([^<]*)<', drawing)
    assert [title.split(":")[0].lower() for title in titles] == steps
    assert "FFN output" in titles[0] and all("hidden states" in title for title in titles[1:])
    entries = [entry for step in facts.repair_steps for entry in step["blocks"]]
    assert drawing.count('class="before"') == sum(entry is not None for entry in entries)
    assert len(chart.table.rows) == 3
    cells = [cell for row in chart.table.rows for cell in row]
    for entry in entries:
        if entry is not None:
            assert f"{entry['error_before']:.6f}" in cells


def test_what_was_kept_and_what_was_rejected(ridge: Path, tmp_path: Path) -> None:
    run = changed_copy(ridge, tmp_path / "run", repaired(BETTER, WORSE, DIVERGED))
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
    assert ("repair", "local (rejected in blocks 1, 2)") in reproduction(read_run(run)).conditions


def test_a_fit_says_how_strong_it_was(ridge: Path, tmp_path: Path) -> None:
    run = changed_copy(ridge, tmp_path / "run", repaired(FITTED, FITTED, FITTED, name="ridge"))
    chart = chart_of(run)
    assert chart.table.rows[0][3] == "kept, strength 0.3"
    assert [entry.swatch for entry in chart.legend] == ["before", "after"]
    assert ("repair", "ridge") in reproduction(read_run(run)).conditions


def test_blocks_that_changed_together_share_a_mark(ridge: Path, tmp_path: Path) -> None:
    run = changed_copy(ridge, tmp_path / "run", repaired(None, None, BETTER | {"blocks": 3}))
    chart = chart_of(run)
    assert [row[1:] for row in chart.table.rows[:2]] == [[NOTHING] * 3] * 2
    drawing = chart.draw(920)
    assert drawing.count('class="before"') == drawing.count('class="after"') == 1
    # They can still be pointed at: the other charts show the same block then.
    assert drawing.count('class="hit"') == 3
    assert drawing.count("shares the error of block 2") == 2
    assert drawing.count('class="stick"') == 2
    assert "share one error, measured after the last of them" in chart.caption


def test_an_error_that_grew_and_was_kept_is_explained(ridge: Path, tmp_path: Path) -> None:
    grew = BETTER | {"error_after": 0.75}
    run = changed_copy(ridge, tmp_path / "run", repaired(BETTER, BETTER, grew))
    assert "judged by the model's predictions" in chart_of(run).caption
    other = changed_copy(ridge, tmp_path / "other", repaired(BETTER, BETTER, WORSE))
    assert "predictions" not in chart_of(other).caption


def test_blocks_after_the_last_error(ridge: Path, tmp_path: Path) -> None:
    run = changed_copy(ridge, tmp_path / "run", repaired(BETTER, BETTER, None))
    assert "Block 2, local: no error of its own" in chart_of(run).draw(400)


def test_experts_are_counted(ridge: Path, tmp_path: Path) -> None:
    experts = [{"kept": True}, {"kept": False}, {"kept": True}]
    run = changed_copy(
        ridge, tmp_path / "run", repaired(FITTED | {"experts": experts}, FITTED, FITTED)
    )
    assert "0.2500 after, rejected in 1 of 3 experts" in chart_of(run).draw(920)


def test_several_runs_share_a_scale(ridge: Path, tmp_path: Path) -> None:
    higher = BETTER | {"error_before": 2.0}
    runs = [
        changed_copy(ridge, tmp_path / "one", repaired(BETTER, BETTER, BETTER)),
        changed_copy(ridge, tmp_path / "two", repaired(BETTER, higher, None)),
        changed_copy(ridge, tmp_path / "three", lambda m: m.update(repair={"steps": []})),
    ]
    chart = chart_of(*runs)
    assert chart.table.head[1] == "one: local, before" and len(chart.table.head) == 7
    drawing = chart.draw(920)
    assert "two: local: relative error" in drawing and "three" not in drawing
    assert re.findall(r'class="tick end"[^>]*>([\d.]+)<', drawing).count("2") == 2


@pytest.mark.parametrize(
    "repair", [{"steps": []}, {"steps": [{"name": "bias", "blocks": []}]}, None]
)
def test_runs_without_errors_have_no_chart(ridge: Path, tmp_path: Path, repair: Any) -> None:
    run = changed_copy(ridge, tmp_path / "run", lambda manifest: manifest.update(repair=repair))
    assert repair_chart([read_run(run)]) is None


def test_errors_of_zero_can_be_drawn(ridge: Path, tmp_path: Path) -> None:
    none = WORSE | {"error_before": 0, "error_after": 0.0}
    run = changed_copy(ridge, tmp_path / "run", repaired(none, none, none))
    assert chart_of(run).table.rows[0][1:3] == ["0.000000", "0.000000"]


def test_what_kept_all_its_channels_was_not_rejected(ridge: Path, tmp_path: Path) -> None:
    whole = BETTER | {"error_before": 0.0, "error_after": 0.0, "kept": False, "training_steps": 0}
    run = changed_copy(ridge, tmp_path / "run", repaired(whole, BETTER, BETTER, name="ridge"))
    chart = chart_of(run)
    drawing = chart.draw(920)
    assert 'class="rejected"' not in drawing and drawing.count('class="before"') == 3
    assert "Block 0, ridge: nothing was cut" in drawing
    assert chart.table.rows[0][3] == "nothing was cut"
    assert [entry.swatch for entry in chart.legend] == ["before", "after"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (0.5, "should be a table"),
        ([], "should be a table"),
        ({}, "does not say whether the new weights were kept"),
        (BETTER | {"kept": 1}, "does not say whether the new weights were kept"),
        (BETTER | {"blocks": 3}, "how many blocks"),
        (BETTER | {"blocks": True}, "how many blocks"),
        (BETTER | {"error_before": None}, "the error before"),
        (BETTER | {"error_before": math.nan}, "the error before"),
        (BETTER | {"error_before": math.inf}, "the error before"),
        (BETTER | {"error_before": 10**400}, "the error before"),
        (BETTER | {"error_before": -0.1}, "the error before"),
        (BETTER | {"error_before": True}, "the error before"),
        (BETTER | {"error_after": None}, "the error after"),
        (WORSE | {"error_after": "large"}, "the error after"),
        ({k: v for k, v in DIVERGED.items() if k != "error_after"}, "the error after"),
        (BETTER | {"experts": [{}]}, "which experts"),
        (BETTER | {"strength": "x"}, "strength or training steps"),
        (BETTER | {"training_steps": "many"}, "strength or training steps"),
    ],
)
def test_damaged_entries_are_refused(ridge: Path, tmp_path: Path, entry: Any, message: str) -> None:
    run = changed_copy(ridge, tmp_path / "run", repaired(BETTER, entry, BETTER))
    with pytest.raises(ReportError, match=rf"cfsp\.json is damaged: .*{message}.*; make") as caught:
        write_report([run], tmp_path / "page.html")
    assert "local, block 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (3, "steps of repair should be a list"),
        ([3], "has no name"),
        ([{"name": 3, "blocks": []}], "has no name"),
        ([{"name": "ridge"}], "blocks of ridge should be a list"),
        ([{"name": "ridge", "blocks": {"0": BETTER}}], "blocks of ridge should be a list"),
        (
            [{"name": "ridge", "blocks": [BETTER] * 2}],
            "2 blocks that ridge repaired, the plan of 3",
        ),
    ],
)
def test_damaged_steps_are_refused(ridge: Path, tmp_path: Path, steps: Any, message: str) -> None:
    run = changed_copy(
        ridge, tmp_path / "run", lambda manifest: manifest.update(repair={"steps": steps})
    )
    with pytest.raises(ReportError, match=message):
        read_run(run)

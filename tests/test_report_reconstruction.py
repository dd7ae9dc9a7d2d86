"""The report on local reconstruction: what it draws, what it tolerates, what it refuses."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli.prune import print_report
from cfsp.errors import ReportError
from cfsp.planning.plan_file import PruningPlan
from cfsp.report.chart import Chart
from cfsp.report.pictures import picture_svg
from cfsp.report.reconstruction_chart import reconstruction_chart, sequential_chart
from cfsp.report.run_facts import read_run
from cfsp.report.summary import NOTHING
from cfsp.report.write import write_report
from cfsp.result.prune_report import PruneReport
from cfsp.settings import Budget, Repair
from report_runs import changed_copy, prune_tiny

Change = Callable[[dict[str, Any]], None]
BETTER = {"error_before": 0.5, "error_after": 0.25, "steps": 1200, "is_better": True}
WORSE = {"error_before": 0.125, "error_after": 7.5, "steps": 100, "is_better": False}
DIVERGED = {"error_before": 0.375, "error_after": None, "steps": 100, "is_better": False}


@pytest.fixture(scope="module")
def ridge(tiny_checkpoint: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reconstruction") / "ridge"
    return prune_tiny(tiny_checkpoint("llama"), text_file, out, budget=Budget(0.5, multiple=8))


def reconstructed(*entries: Any) -> Change:
    """Make a manifest that of a run with local reconstruction; `...` leaves an entry out."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["restoration"]["method"] = "local"
        for block, entry in zip(manifest["restoration"]["blocks"], entries, strict=True):
            if entry is not ...:
                block["local"] = entry

    return change


def chart_of(*runs: Path) -> Chart:
    chart = reconstruction_chart([read_run(run) for run in runs])
    assert chart is not None
    return chart


@pytest.mark.parametrize(
    ("restore", "charts", "key", "act"),
    [
        ("sequential", [sequential_chart], "sequential", "the fit"),
        ("local", [sequential_chart, reconstruction_chart], "local", "training"),
    ],
)
def test_a_real_run_has_a_chart_of_every_step(
    restore: Repair,
    charts: list[Any],
    key: str,
    act: str,
    tiny_checkpoint: Any,
    text_file: Path,
    tmp_path: Path,
) -> None:
    run = prune_tiny(
        tiny_checkpoint("llama"),
        text_file,
        tmp_path / "run",
        budget=Budget(0.5, multiple=8),
        restore=restore,
    )
    facts = read_run(run)
    assert [c for c in (sequential_chart, reconstruction_chart) if c([facts])] == charts
    entries = facts.reconstructed_blocks(key)
    drawn = [entry for entry in entries if entry is not None]
    assert drawn and all(BETTER.keys() <= entry.keys() for entry in drawn)
    chart = charts[-1]([facts])
    assert chart.legend[0].name == f"before {act}"
    rows = chart.table.rows
    assert len(rows) == len(entries)
    for row, entry in zip(rows, entries, strict=True):
        assert row[1] == (NOTHING if entry is None else f"{entry['error_before']:.6f}")


def test_errors_of_every_block_are_drawn_and_said_in_a_table(ridge: Path, tmp_path: Path) -> None:
    run = changed_copy(ridge, tmp_path / "run", reconstructed(BETTER, WORSE, DIVERGED))
    chart = chart_of(run)
    assert list(chart.table.head) == ["block", "before", "after training", "steps", "outcome"]
    assert chart.table.rows == [
        ["0", "0.500000", "0.250000", "1,200", "trained"],
        ["1", "0.125000", "7.500000", "100", "left alone"],
        ["2", "0.375000", "no number", "100", "left alone"],
    ]
    for drawing in chart.drawings:
        # The scale ends at the highest error that a block has, not at one that was thrown away.
        ticks = re.findall(r'class="tick end"[^>]*>([\d.]+)<', drawing)
        assert 0.5 <= max(map(float, ticks)) < 1
        shapes = {name: drawing.count(f'class="{name}"') for name in ("before", "after", "alone")}
        assert shapes == {"before": 3, "after": 1, "alone": 2}
        said = [html.unescape(words) for words in re.findall(r'data-say="(.*?)"', drawing)]
        alone = "left alone because training did not help"
        assert said == [
            "Block 0: error 0.5000, after training 0.2500",
            f"Block 1: error 0.1250, after training 7.5000, {alone}",
            f"Block 2: error 0.3750, after training no number, {alone}",
        ]
    assert [entry.swatch for entry in chart.legend] == ["before", "after", "alone"]
    assert "train together" not in chart.caption


def test_the_page_and_its_picture_have_the_chart(ridge: Path, tmp_path: Path) -> None:
    run = changed_copy(ridge, tmp_path / "run", reconstructed(BETTER, WORSE, BETTER))
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    titles = re.findall(r'<h2 id="(\w+)-1">', page)
    assert titles == ["summary", "blocks", "strengths", "restoration", "reconstruction"]
    assert '<span class="swatch alone">' in page and ".swatch.alone" in page
    picture = picture_svg(chart_of(run))
    assert "var(" not in picture
    assert picture.count('class="alone"') == 2  # the legend's and the block's


def test_blocks_without_an_entry_are_left_out(ridge: Path, tmp_path: Path) -> None:
    run = changed_copy(ridge, tmp_path / "run", reconstructed(..., None, BETTER))
    chart = chart_of(run)
    assert chart.table.rows == [
        ["0", *[NOTHING] * 4],
        ["1", *[NOTHING] * 4],
        ["2", "0.500000", "0.250000", "1,200", "trained"],
    ]
    drawing = chart.draw(920)
    assert drawing.count('class="before"') == drawing.count('class="after"') == 1
    # They can still be pointed at: the other charts show the same block then.
    assert drawing.count('class="hit"') == 3
    assert drawing.count("no error of its own") == 2
    assert "share one error, measured after the last of them" in chart.caption
    assert [entry.swatch for entry in chart.legend] == ["before", "after"]


def test_several_runs_share_a_scale(ridge: Path, tmp_path: Path) -> None:
    higher = BETTER | {"error_before": 2.0}
    runs = [
        changed_copy(ridge, tmp_path / "one", reconstructed(BETTER, BETTER, BETTER)),
        changed_copy(ridge, tmp_path / "two", reconstructed(..., higher, None)),
    ]
    chart = chart_of(runs[0], ridge, runs[1])
    assert chart.table.head[1] == "one: before" and chart.table.head[-1] == "two: outcome"
    assert all(len(row) == 9 for row in chart.table.rows)
    drawing = chart.draw(920)
    assert "two: relative error" in drawing and "ridge:" not in drawing
    assert re.findall(r'class="tick end"[^>]*>([\d.]+)<', drawing).count("2") == 2


@pytest.mark.parametrize("entries", [(..., ..., ...), (None, None, None)])
def test_runs_without_reconstruction_have_no_chart(
    ridge: Path, tmp_path: Path, entries: tuple[Any, ...]
) -> None:
    run = changed_copy(ridge, tmp_path / "run", reconstructed(*entries))
    assert reconstruction_chart([read_run(run)]) is None


def test_errors_of_zero_can_be_drawn(ridge: Path, tmp_path: Path) -> None:
    none = WORSE | {"error_before": 0, "error_after": 0.0, "steps": 0}
    run = changed_copy(ridge, tmp_path / "run", reconstructed(none, none, none))
    assert chart_of(run).table.rows[0][1:3] == ["0.000000", "0.000000"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (0.5, "block 1 should be a table"),
        ([], "block 1 should be a table"),
        ({}, "does not say whether the block is better"),
        (BETTER | {"is_better": 1}, "does not say whether the block is better"),
        (BETTER | {"steps": "many"}, "number of steps"),
        (BETTER | {"steps": -1}, "number of steps"),
        (BETTER | {"error_before": None}, "the error before"),
        (BETTER | {"error_before": math.nan}, "the error before"),
        (BETTER | {"error_before": math.inf}, "the error before"),
        (BETTER | {"error_before": 10**400}, "the error before"),
        (BETTER | {"error_before": -0.1}, "the error before"),
        (BETTER | {"error_before": True}, "the error before"),
        (BETTER | {"error_after": None}, "the error after"),
        (WORSE | {"error_after": "large"}, "the error after"),
        ({k: v for k, v in DIVERGED.items() if k != "error_after"}, "the error after"),
    ],
)
def test_damaged_entries_are_refused(ridge: Path, tmp_path: Path, entry: Any, message: str) -> None:
    run = changed_copy(ridge, tmp_path / "run", reconstructed(BETTER, entry, BETTER))
    with pytest.raises(ReportError, match=rf"cfsp\.json is damaged: .*{message}.*; make") as caught:
        write_report([run], tmp_path / "page.html")
    assert "the local reconstruction of block 1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("blocks", [None, 3, {"local": BETTER}])
def test_blocks_that_are_no_list_are_refused(ridge: Path, tmp_path: Path, blocks: Any) -> None:
    run = changed_copy(
        ridge, tmp_path / "run", lambda manifest: manifest["restoration"].update(blocks=blocks)
    )
    with pytest.raises(ReportError, match="blocks should be a list"):
        read_run(run)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ((BETTER, WORSE, DIVERGED), "0.333 -> 0.250"),
        ((..., None, BETTER), "0.500 -> 0.250"),
        ((None, ..., None), None),
    ],
)
def test_summary_of_prune_is_of_the_blocks_that_have_an_error(
    ridge: Path,
    capsys: pytest.CaptureFixture[str],
    entries: tuple[Any, ...],
    expected: str | None,
) -> None:
    manifest = read_run(ridge).manifest
    reconstructed(*entries)(manifest)
    plan = PruningPlan.load(ridge / "cfsp_plan.json")
    print_report(_prune_report(manifest, plan))
    said = capsys.readouterr().out
    assert "restored: FFN output error on held-out windows" in said
    line = f"reconstructed: hidden states' error on held-out windows {expected}"
    assert (line in said) if expected else ("reconstructed" not in said)


def _prune_report(manifest: dict[str, Any], plan: PruningPlan) -> PruneReport:
    return PruneReport(
        parameters_before=manifest["parameters_before"],
        parameters_after=manifest["parameters_after"],
        ffn_sparsity=manifest["ffn_sparsity"],
        model_sparsity=manifest["model_sparsity"],
        intermediate_sizes=manifest["intermediate_sizes"],
        calibration_tokens=256,
        restoration=manifest["restoration"],
        experts_with_few_tokens=[],
        goal={},
        perplexity={},
        seconds={},
        passes={},
        peak_rss_bytes=0,
        out=None,
        plan=plan,
    )

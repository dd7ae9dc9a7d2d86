"""Damaged manifests are refused in one sentence that says where, by `report` and by `inspect`."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main
from cfsp.errors import CheckpointError, ReportError
from cfsp.result.page.page import write_report
from report_runs import BETTER, DIVERGED, WORSE, changed_copy, measured

Change = Callable[[dict[str, Any]], object]


def refusal(run: Path, place: Path, change: Change) -> str:
    copy = changed_copy(run, place / "copy", change)
    with pytest.raises((CheckpointError, ReportError)) as caught:
        write_report([copy], place / "page.html")
    assert not (place / "page.html").exists()
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(str(copy), "COPY")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("widths_before"), "of the model's size it has only parameters_before"),
        (lambda m: m.update(parameters_after="many"), "parameters_after should be a number"),
        (lambda m: m.update(intermediate_sizes=[8, 8, 8]), "give different widths; they are of"),
        (lambda m: m["repair"]["steps"][0]["blocks"].pop(), "2 blocks that ridge repaired, the "),
        (
            lambda m: m.update(perplexity=measured("x", 1, 2) | measured("y", 1, 2, stride="?")),
            "perplexity.y.stride should be a whole number, found '?'",
        ),
        (lambda m: m.update(perplexity={"x": {"before": 1}}), "perplexity.x.after is missing"),
        (lambda m: m.update(comparison={"kept": {}}), "comparison.kept.first is missing"),
        (lambda m: m.update(speed={"models": [{}]}), "the speed in the manifest is damaged"),
        (lambda m: m.update(manifest_version=99), "manifest version 99"),
        (lambda m: m.update(repair={"steps": 3}), "repair.steps should be a list"),
        (lambda m: m.update(repair={"steps": [3]}), "repair.steps[0] should be a table"),
        (lambda m: m.update(repair={"steps": [{"name": 3}]}), "repair.steps[0].name should be te"),
        (lambda m: m.update(repair={"steps": [{"name": "x"}]}), "repair.steps[0].blocks is missi"),
    ],
)
def test_damaged_manifests_are_refused(
    run: Path, tmp_path: Path, change: Change, message: str
) -> None:
    assert message in refusal(run, tmp_path, change)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (0.5, " should be a table"),
        ({}, ".blocks is missing"),
        (BETTER | {"kept": 1}, ".kept should be true or false, found 1"),
        (BETTER | {"blocks": 3}, ".blocks should be from 1 to 2, found 3"),
        (BETTER | {"blocks": True}, ".blocks should be a whole number"),
        *(
            (BETTER | {"error_before": value}, ".error_before should be a finite number from 0")
            for value in (None, math.nan, math.inf, 10**400, -0.1, True)
        ),
        (BETTER | {"error_after": None}, ".error_after is missing"),
        (WORSE | {"error_after": "large"}, ".error_after should be a finite number"),
        ({k: v for k, v in DIVERGED.items() if k != "error_after"}, ".error_after is missing"),
        (BETTER | {"experts": [{}]}, ".experts[0].kept is missing"),
        (BETTER | {"strength": "x"}, ".strength should be a number"),
        (BETTER | {"training_steps": "many"}, ".training_steps should be a number"),
        (BETTER | {"block": 1}, ".path is missing"),
    ],
)
def test_damaged_entries_of_repair_are_refused(
    run: Path, tmp_path: Path, entry: Any, message: str
) -> None:
    steps = [{"name": "local", "blocks": [BETTER, entry, BETTER]}]
    said = refusal(run, tmp_path, lambda m: m.update(repair={"steps": steps}))
    assert f"COPY/cfsp.json is damaged: repair.steps[0].blocks[1]{message}" in said
    assert said.endswith("; prune the model again")


def test_inspect_refuses_the_same(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = changed_copy(run, tmp_path / "copy", lambda m: m.update(calibration=[]))
    assert main(["inspect", str(copy)]) == 2
    assert "cfsp.json is damaged: calibration should be a table; prune" in capsys.readouterr().err

"""Damaged manifests are refused in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import CheckpointError, ReportError
from cfsp.result.runs import read_run
from report_runs import BETTER, DIVERGED, WORSE, changed_copy, measured

Change = Callable[[dict[str, Any]], object]


def refusal(run: Path, place: Path, change: Change) -> str:
    copy = changed_copy(run, place / "copy", change)
    with pytest.raises((CheckpointError, ReportError)) as caught:
        read_run(copy)
    said = str(caught.value)
    assert "\n" not in said
    return said.replace(str(copy), "COPY")


DAMAGED = "COPY/cfsp.json is damaged ("


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("widths_before"), f"{DAMAGED}KeyError('widths_before')); prune the model"),
        (lambda m: m.update(parameters_after="many"), "'many'"),
        (lambda m: m.update(base_model=[]), "'list' object"),
        (lambda m: m.update(perplexity={"x": {"before": 1}}), "'tokens'"),
        (lambda m: m.update(perplexity=measured("x", 1, 2) | {"y": 3}), "'int' object"),
        (lambda m: m.update(comparison={"kept": {"second": {"value": "x"}}}), "'x'"),
        (lambda m: m.update(recovery={"history": [{"step": 0}]}), "'adaptation'"),
        (lambda m: m.update(speed={"models": [{}]}), "'model'"),
        (lambda m: m.update(repair={"steps": 3}), "'int' object"),
        (lambda m: m.update(repair={"steps": [3]}), "'int' object"),
        (lambda m: m.update(repair={"steps": [{"name": "x"}]}), "'blocks'"),
        (lambda m: m.update(intermediate_sizes=[8, 8, 8]), "give different widths; they are of"),
        (lambda m: m["repair"]["steps"][0]["blocks"].pop(), "2 blocks that ridge repaired, the "),
        (lambda m: m.update(manifest_version=99), "manifest version 99"),
    ],
)
def test_damaged_manifests_are_refused(run, tmp_path, change, message):
    assert message in refusal(run, tmp_path, change)


@pytest.mark.parametrize(
    "entry",
    [
        0.5,
        {},
        BETTER | {"blocks": 3},
        BETTER | {"blocks": 0},
        *(BETTER | {"error_before": x} for x in (None, math.nan, math.inf, 10**400, -0.1)),
        BETTER | {"error_after": None},
        WORSE | {"error_after": "large"},
        {k: v for k, v in DIVERGED.items() if k != "error_after"},
        BETTER | {"experts": [{}]},
        BETTER | {"strength": "x"},
        BETTER | {"training_steps": "many"},
        BETTER | {"block": 1},
    ],
)
def test_damaged_entries_of_repair_are_refused(run, tmp_path, entry):
    steps = [{"name": "local", "blocks": [BETTER, entry, BETTER]}]
    said = refusal(run, tmp_path, lambda m: m.update(repair={"steps": steps}))
    assert said.startswith(DAMAGED)

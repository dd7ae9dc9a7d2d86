"""Study 9's smallest version runs on a tiny model, and prints what is published."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "studies"))

import parts
import run as runner
from cfsp.errors import OutputError
from conditions import label
from results import Results

STUDY = "9"


@pytest.mark.usefixtures("models_start_quickly")
def test_parts(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "rows.json"
    texts = ("--data", text_file, "--eval", text_file, "--eval", other_text_file)
    size = ("--seqlen", 32, "--windows", 2, "--samples", 4, "--stays", 0.6, "--rounds", 1)
    choices = ("--choices", "ffn", "all", "--models", tmp_path / "models")
    model = ("--model", tiny_checkpoint("llama"))
    parts.main([*map(str, (*model, *texts, *size, *choices, "--out", out))])
    rows, printed = json.loads(out.read_text())["rows"], capsys.readouterr().out
    rows, timed = rows[:4], rows[4:]
    assert [(row["parts"], row["state"]) for row in rows] == [
        (choice, state) for choice in ("ffn", "all") for state in ("unrepaired", "repaired")
    ]
    assert max(row["parameters"] for row in rows) < 1.1 * min(row["parameters"] for row in rows)
    assert [row["KL - ffn"][0] for row in rows[:2]] == [0, 0]
    for row in rows[2:]:
        alone = rows[row["state"] == "repaired"]
        assert row["KL - ffn"][0] == pytest.approx(row["KL"][0] - alone["KL"][0], abs=2e-3)
    assert all(row["worst"] >= row["mean"] > 0.9 and "%" in row["what goes"] for row in rows)
    assert "| 60.0% | ffn | unrepaired |" in printed
    assert [row["parts"] for row in timed] == ["ffn", "all"]
    assert all(row["prefill"] > 0 and row["decode"] > 0 for row in timed)
    assert timed[0]["KV cache"] == "100%"
    assert "| 60.0% | ffn | 1 rounds | 100% |" in printed


def test_recipe_prints_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tomllib.loads(runner.RECIPES[STUDY].read_text())
    for name in recipe["eval"]:  # nobody reads them
        path = tmp_path / name.removeprefix("DIR/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def never(*_: Any) -> None:
        raise AssertionError("a published row is missing")

    monkeypatch.setattr(parts, "step", never)
    assert runner.main([STUDY, "--texts", str(tmp_path)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    published = (REPOSITORY / "docs/STUDIES.md").read_text()
    table = published.split(f"python studies/run.py {STUDY} --texts DIR")[1].split("\n\n")[1]
    assert len(table.splitlines()) > 10
    assert not set(table.splitlines()) - set(printed)


def test_texts_that_are_missing_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main([STUDY, "--texts", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "wikitext2/test.parquet is not there; --texts is a directory" in shown.err
    assert shown.err.count("\n") == 1 and not shown.out


def test_results_are_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    results = Results(path, {"windows": 2})
    results.measure({"seed": 0}, lambda: {"value": 1.0})
    results.measure({"seed": 1}, lambda: {"value": 2.0})

    def never() -> dict[str, float]:
        raise AssertionError

    again = Results(path, {"windows": 2})
    assert again.measure({"seed": 1}, never) == {"seed": 1, "value": 2.0}
    with pytest.raises(OutputError, match="other conditions"):
        Results(path, {"windows": 3})


def test_labels_hide_paths(text_file: Path) -> None:
    assert label(str(text_file)) == f"{text_file.parent.name}/prose"
    assert label("wikitext2") == "wikitext2"

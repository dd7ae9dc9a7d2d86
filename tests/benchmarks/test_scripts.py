"""What scripts of benchmarks/ write: choose.py, families.py; and what all say before any work."""

import importlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

import choose
import serving
from cfsp.families.catalogue import Family, proved_before
from conftest import REPOSITORY
from families import line_of


def entry(model: str, weight_type: str, nbytes: int, perplexity: float) -> dict[str, Any]:
    return {
        "model": model,
        "weight_type": weight_type,
        "nbytes": nbytes,
        "prefill": 1e9 / nbytes,
        "decode": 2e9 / nbytes,
        "perplexity": {"wikitext2": perplexity, "c4": 2 * perplexity},
        "same_choice": 0.5,
        "notes": [],
    }


FILES = [
    entry("dense", "f16", 200_000_000, 20.0),
    entry("dense", "q8_0", 100_000_000, 20.1),
    entry("pruned 20%", "f16", 160_000_000, 25.0),
]


def test_the_picture_has_a_point_for_every_file():
    root = ElementTree.fromstring(choose.picture(FILES))
    circles = [node for node in root.iter() if node.tag.endswith("circle")]
    # One for every file, one for every model in the legend.
    assert len(circles) == len(FILES) + 2
    assert len([node for node in root.iter() if node.tag.endswith("polyline")]) == 2


def test_the_table_compares_with_the_dense_model():
    scored = {
        "accuracy": {"value": 0.432, "stderr": 0.02},
        "difference": {"value": -0.031, "stderr": 0.008},
        "kept": {"value": 0.8, "stderr": 0.01},
    }
    lines = choose.table(FILES).splitlines()
    assert lines[0].startswith("| model | type | MB | size | prefill | decode | wikitext2 | c4 |")
    assert lines[4] == "| pruned 20% | f16 | 160 | 0.80 | 1.25x | 1.25x | 25.0 | 50.0 | 50% |"
    lines = choose.table([FILES[0], FILES[2] | {"tasks": scored}]).splitlines()
    assert lines[0].endswith("| same choice | tasks | to dense F16 |")
    assert lines[2].endswith("| 50% |  |  |")
    assert lines[3].endswith("| 50% | 43.2 | -3.1 (0.8) |")


def test_the_published_lines_are_what_it_writes():
    _, before = proved_before()
    published = (REPOSITORY / "src/cfsp/families/proved.json").read_text(encoding="utf-8")
    assert published.splitlines()[1:-1] == [
        line_of(family, reasons) + "," * (number < len(before))
        for number, (family, reasons) in enumerate(before.items(), 1)
    ]


def test_a_long_reason_is_cut_and_what_can_go_has_none():
    reasons = {"ffn": None, "kv": "a | b\n" + 200 * "c"}
    row = json.loads(line_of(Family("a", "A"), reasons))
    assert row["class"] == "A"
    assert list(row["why_not"]) == ["kv"]
    assert row["why_not"]["kv"].startswith("a | b ccc") and len(row["why_not"]["kv"]) == 164


@pytest.mark.parametrize(
    "script",
    [
        path.stem
        for path in sorted((REPOSITORY / "benchmarks").glob("*.py"))
        if "__main__" in path.read_text(encoding="utf-8")
    ],
)
def test_a_question_for_help_begins_no_work(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: {script}.py")


def test_servers_that_are_not_installed_are_named_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(serving.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(serving, "_pruned", lambda name, work: pytest.fail("it started"))
    monkeypatch.setattr(sys, "argv", ["serving.py", "--server", "mlx-lm server"])
    with pytest.raises(SystemExit) as ended:
        serving.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "mlx_lm not installed here; `make serve-check` installs all servers" in error

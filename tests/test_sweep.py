"""Sweeps: recipes, resuming, tables, the Pareto front, and the report of a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsp.checkpoint.locating import open_checkpoint
from cfsp.cli import main
from cfsp.cli.sweep import METHODS as CLI_METHODS
from cfsp.errors import UsageError
from cfsp.pipeline import calibrate_source
from cfsp.planning.fine import channel_scores, read_ffn_weights
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import CalibrationText, Compute
from cfsp.sweep.front import pareto_front
from cfsp.sweep.methods import METHODS
from cfsp.sweep.recipe import Recipe, read_recipe
from cfsp.text.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def sweep(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[str], Path]:
    """The arguments of a sweep of two methods at two sparsities, and its directory."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    arguments = [
        "sweep", str(tiny_checkpoint("llama")), "--sparsity", "0.25", "0.5",
        "--method", "cfsp", "random", "--multiple", "4", "--data", str(text_file),
        "--samples", "8", "--seqlen", "32", "--eval", str(text_file), "--eval-windows", "2",
        "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    return arguments, out


def test_every_method_makes_every_sparsity_at_the_same_size(
    sweep: tuple[list[str], Path], text_file: Path
) -> None:
    _, out = sweep
    rows = json.loads((out / "table.json").read_text())
    assert [row["name"] for row in rows] == [
        "dense", "cfsp-0.25", "cfsp-0.5", "random-0.25", "random-0.5",
    ]  # fmt: skip
    size = {row["name"]: row["parameters"] for row in rows}
    assert size["dense"] > size["cfsp-0.25"] == size["random-0.25"] > size["cfsp-0.5"]
    for row in rows[1:]:
        directory = Path(row["directory"])
        plan = PruningPlan.load(directory / "cfsp_plan.json")
        assert plan.ffn_sparsity == pytest.approx(row["sparsity"], abs=0.05)
        assert not list(directory.glob("model*.safetensors"))
        assert row["perplexity"][str(text_file)] > 1
    kept = [
        PruningPlan.load(out / f"{name}-0.5" / "cfsp_plan.json").blocks[0].kept
        for name in ("cfsp", "random")
    ]
    assert kept[0] != kept[1]
    head, rule, *lines = (out / "table.md").read_text().splitlines()
    assert head.startswith("| model | sparsity | parameters |")
    assert rule.count("|") == head.count("|")
    assert len(lines) == len((out / "table.csv").read_text().splitlines()) - 1 == 5


def test_a_sweep_goes_on_where_it_stopped(
    sweep: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    arguments, out = sweep
    before = (out / "table.json").read_bytes()
    untouched = (out / "cfsp-0.25" / "cfsp.json").stat().st_mtime_ns
    shutil.rmtree(out / "random-0.25")
    (out / ".working").mkdir()
    (out / ".working" / "half").write_text("left by a kill")
    assert main(arguments) == 0
    assert (out / "table.json").read_bytes() == before
    assert (out / "cfsp-0.25" / "cfsp.json").stat().st_mtime_ns == untouched
    assert not (out / ".working").exists()
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "holds a sweep of another recipe" in error
    assert error.count("\n") == 1


def test_its_recipe_gives_the_same_sweep(sweep: tuple[list[str], Path], tmp_path: Path) -> None:
    _, out = sweep
    again = tmp_path / "again"
    assert main(["sweep", "--recipe", str(out / "recipe.toml"), "--out", str(again)]) == 0
    first, second = (json.loads((d / "table.json").read_text()) for d in (out, again))
    for row in [*first, *second]:
        del row["directory"]
    assert first == second


def test_report_shows_the_front(sweep: tuple[list[str], Path], tmp_path: Path) -> None:
    _, out = sweep
    runs = [str(out / name) for name in ("cfsp-0.25", "cfsp-0.5", "random-0.5")]
    page = tmp_path / "report.html"
    assert main(["report", *runs, "--out", str(page)]) == 0
    html = page.read_text()
    assert "Quality against size and speed" in html
    assert "the original: 100 % of parameters" in html
    assert "weights on disk" not in html
    single = tmp_path / "single.html"
    assert main(["report", runs[0], "--out", str(single)]) == 0
    assert "Quality against size and speed" not in single.read_text()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_front_holds_exactly_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)
    assert any(front)
    for point, best in zip(points, front, strict=True):
        beaten = any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        assert best != beaten


def test_random_is_the_same_for_the_same_calibration(
    tiny_checkpoint: Callable[[str], Path], text_file: Path
) -> None:
    source = open_checkpoint(tiny_checkpoint("llama"))
    tokenizer = load_tokenizer(source.directory)
    scores = []
    for seed in (0, 0, 1):
        text = CalibrationText((str(text_file),), 4, 32, seed)
        statistics = calibrate_source(source, tokenizer, text, Compute())
        scores += [
            channel_scores("random", statistics.blocks[b], read_ffn_weights(source, b)).tolist()
            for b in (0, 1)
        ]
    assert scores[0] == scores[2]
    assert scores[1] == scores[3]
    assert scores[0] != scores[1]
    assert scores[0] != scores[4]


def test_parser_knows_every_method() -> None:
    assert tuple(METHODS) == CLI_METHODS


def test_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = Recipe('a "b" ü', (0.1, 0.5), ("cfsp", "random"), eval=("x", "y"), speed=True)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert read_recipe(path) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "m"', "has no sparsity"),
        ("model", "cannot read the recipe"),
        ('model = "m"\nsparsity = [0.1]\nspeling = 1', "unknown keys: speling"),
        ('model = "m"\nsparsity = ["a"]', "sparsity must be a list of numbers"),
        ('model = "m"\nsparsity = 0.5', "sparsity must be a list of numbers"),
        ('model = 3\nsparsity = [0.5]\neval = ["t"]', "model must be of type str"),
        ('model = "m"\nsparsity = [0.5]', "give --eval"),
        ('model = "m"\nsparsity = [1.5]\neval = ["t"]', r"must be in \[0, 1\)"),
        ('model = "m"\nsparsity = [0.5, 0.5]\neval = ["t"]', "every sparsity once"),
        ('model = "m"\nsparsity = [0.5]\neval = ["t"]\nmethods = ["x"]', "unknown method 'x'"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recipe(path)


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["sweep", "--out", out]) == 2
    assert "expected a model or a --recipe" in capsys.readouterr().err
    assert main(["sweep", "m", "--recipe", "r.toml", "--out", out]) == 2
    assert "--recipe says it all" in capsys.readouterr().err
    assert not Path(out).exists()

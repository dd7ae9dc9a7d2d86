"""Sweeps: recipes, resuming, tables, the Pareto front, and the report of a sweep."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp.cli import main
from cfsp.errors import UsageError
from cfsp.planning.plan_file import PruningPlan
from cfsp.result.manifest import read_manifest
from cfsp.result.tables import pareto_front
from cfsp.settings import Budget, Compute
from cfsp.sweep.methods import METHODS, method_named
from cfsp.sweep.recipe import Recipe, read_recipe
from cfsp.sweep.table import Row, loss_rise, tables


@pytest.fixture(scope="module")
def sweep(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[str], Path]:
    """The arguments of a sweep of two methods at two sparsities, and its directory."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    arguments = [
        "sweep", str(tiny_checkpoint("llama")), "--sparsity", "25%", "0.5",
        "--method", "cfsp", "cfsp-plain", "--multiple", "4", "--data", str(text_file),
        "--samples", "8", "--seqlen", "32", "--eval", str(text_file), "--windows", "2",
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
        "dense", "cfsp-0.25", "cfsp-0.5", "cfsp-plain-0.25", "cfsp-plain-0.5",
    ]  # fmt: skip
    size = {row["name"]: row["parameters"] for row in rows}
    assert size["dense"] > size["cfsp-0.25"] == size["cfsp-plain-0.25"] > size["cfsp-0.5"]
    for row in rows[1:]:
        directory = Path(row["directory"])
        plan = PruningPlan.load(directory / "cfsp_plan.json")
        assert plan.ffn_sparsity == pytest.approx(row["sparsity"], abs=0.05)
        assert not list(directory.glob("model*.safetensors"))
        measured = row["perplexity"][str(text_file)]
        assert measured.pop("value") > 1
        assert measured.items() <= rows[0]["perplexity"][str(text_file)].items()
        assert measured["windows"] == 2
        assert measured["tokens"] == 62
        compared = read_manifest(directory)["perplexity"][str(text_file)]
        assert set(compared) == {"before", "after", *measured}
    kept = [
        PruningPlan.load(out / f"{name}-0.5" / "cfsp_plan.json").units[0].kept
        for name in ("cfsp", "cfsp-plain")
    ]
    assert kept[0] != kept[1]
    caption, _, head, rule, *lines = (out / "table.md").read_text().splitlines()
    assert "2 windows of 32 tokens" in caption
    assert head.startswith("| method | sparsity | parameters removed |")
    assert rule.count("|") == head.count("|")
    assert [line.split("|")[1].strip() for line in lines] == [
        "dense",
        *2 * ["cfsp"],
        *2 * ["cfsp-plain"],
    ]


def test_it_compares_with_the_dense_model_if_asked_to(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    (tmp_path / "tasks").mkdir()
    lines = [
        {"query": f"Question: {number}", "choices": ["one river", "two stones"], "gold": number % 2}
        for number in range(6)
    ]
    (tmp_path / "tasks" / "piqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    arguments = [
        "sweep", str(tiny_checkpoint("llama")), "--sparsity", "25%", "--multiple", "4",
        "--data", str(text_file), "--samples", "8", "--seqlen", "32", "--eval", str(text_file),
        "--windows", "2", "--agreement", "--tasks", "piqa", "--set", "limit=4",
        "--set", f"task_data={tmp_path / 'tasks'}", "--answers", "2", "--out", str(out),
    ]  # fmt: skip
    assert main(arguments) == 0
    dense, pruned = json.loads((out / "table.json").read_text())
    assert dense["comparison"] is None
    found = pruned["comparison"]
    divergence = found["texts"][str(text_file)]["divergence"]
    assert divergence["first"]["value"] == 0 < divergence["second"]["value"]
    assert found["tasks"]["piqa"]["documents"] == 4
    assert found["left_out"] == ["piqa"]  # a random model guesses
    tables = (out / "table.md").read_text()
    assert found["questions"] == 2 and found["answers"]["divergence"]["second"]["value"] > 0
    columns = "| KL | top-1 agreement, % | KL on answers | answers that loop, % |"
    assert f"| method | sparsity | seed {columns}" in tables
    assert "Left out: piqa." in tables
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    html = page.read_text()
    assert "KL per token, nats" in html
    assert "KL per token on the original&#39;s answers, nats" in html
    assert "piqa, answers as the original" in html
    assert "the original does not beat a guess; not in the mean" in html
    manifest = out / "cfsp-0.25" / "cfsp.json"
    fields = json.loads(manifest.read_text())
    fields["comparison"]["texts"][str(text_file)]["agreed"] = {"first": 1}
    manifest.write_text(json.dumps(fields))
    assert main(["report", str(out), "--out", str(page)]) == 2
    assert "cfsp.json is damaged" in capsys.readouterr().err


def test_a_sweep_goes_on_where_it_stopped(
    sweep: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = sweep
    before = (out / "table.json").read_bytes()
    untouched = (out / "cfsp-0.25" / "cfsp.json").stat().st_mtime_ns
    shutil.rmtree(out / "cfsp-plain-0.25")
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
    runs = [str(out / name) for name in ("cfsp-0.25", "cfsp-0.5", "cfsp-plain-0.5")]
    page = tmp_path / "report.html"
    assert main(["report", *runs, "--out", str(page)]) == 0
    html = page.read_text()
    assert "Quality against size and speed" in html
    assert "the original: 100 % of parameters" in html
    assert "weights on disk" not in html
    single = tmp_path / "single.html"
    assert main(["report", runs[0], "--out", str(single)]) == 0
    assert "Quality against size and speed" not in single.read_text()


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_front_holds_exactly_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front(points)
    assert any(front)
    for point, best in zip(points, front, strict=True):
        beaten = any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        assert best != beaten


OWN = {
    "name": "own",
    "block_metric": "uniform",
    "multiple": 8,
    "parts": ("kv",),
}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("\U0001f600", (0.5,), eval=("\U0001f600.txt", 'a "b"\n')),
        Recipe("m", (0.1, 0.5), (METHODS["cfsp-plain"], OWN), samples=9, seed=(0, 1 << 40),
               data=("\x7f", ""), eval=("t",), speed=True),
    ],
)  # fmt: skip
def test_recipe_survives_its_file(tmp_path: Path, recipe: Recipe) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(recipe.to_toml().encode())
    assert read_recipe(path) == recipe


def test_a_recipe_names_its_own_methods(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        'model = "m"\nsparsity = [0.5]\neval = ["t"]\nseed = [0, 1]\n'
        'methods = ["cfsp-plain", {name = "equal", block_metric = "uniform", repair = "none"}, '
        '{name = "two", parts = ["attention"]}]'
    )
    recipe = read_recipe(path)
    equal = {"name": "equal", "block_metric": "uniform", "repair": "none"}
    two = {"name": "two", "parts": ("attention",)}
    assert recipe.methods == (METHODS["cfsp-plain"], equal, two)
    points = recipe.points(Compute())
    assert [point.name for point in points] == [
        "cfsp-plain-0.5-seed0", "cfsp-plain-0.5-seed1", "equal-0.5-seed0", "equal-0.5-seed1",
        "two-0.5-seed0", "two-0.5-seed1",
    ]  # fmt: skip
    assert points[-1].settings.budget == Budget(0.5, parts=("attention",))
    assert points[2].settings.criterion.block_metric == "uniform"
    assert [points[i].settings.repair for i in (2, 4)] == ["none", "ridge"]


GOOD = 'model = "m"\nsparsity = [0.5]\neval = ["t"]\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('model = "m"', "has no sparsity"),
        ("model", "cannot read the recipe"),
        (f"{GOOD}speling = 1", "unknown keys: speling"),
        (GOOD.replace("0.5", '"a"'), "sparsity must be of type float, found 'a'"),
        (GOOD.replace("[0.5]", "0.5"), "sparsity must be a list, found 0.5"),
        (GOOD.replace('"m"', "3"), "model must be of type str"),
        ('model = "m"\nsparsity = [0.5]', "give --eval"),
        (GOOD.replace("0.5", "1.5"), r"must be in \[0, 1\)"),
        (GOOD.replace("0.5", "0.5, 0.5"), "every sparsity and every seed"),
        (f'{GOOD}methods = ["x"]', "unknown method 'x'"),
    ],
)
def test_a_bad_recipe_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ('name = "cfsp", repair = "none"', "cfsp is another method than the one of that name"),
        ('name = "cfsp-plain"', "or the name alone, as a string"),
        ('name = "a/b"', "must do as that of a directory"),
        ('name = ".working"', "must do as that of a directory"),
        ('name = "a", block_metric = "x"', "a: --block-metric must be one of auto.*, found 'x'"),
        ('name = "a", repair = "x"', "a: repair must be one of none, ridge.*, found 'x'"),
        ('name = "a", multiple = "8"', "multiple must be of type int, found '8'"),
        ('name = "a", multiple = 0', "multiple must be at least 1"),
        ('name = "a", of = "x"', "unknown keys: of"),
        ('repair = "none"', "has no name"),
    ],
)
def test_a_bad_method_is_one_sentence(tmp_path: Path, method: str, message: str) -> None:
    test_a_bad_recipe_is_one_sentence(tmp_path, f"{GOOD}methods = [{{{method}}}]", message)


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["sweep", "--out", out]) == 2
    assert "expected a model or a --recipe" in capsys.readouterr().err
    assert main(["sweep", "m", "--eval", "t", "--data", "d", "--out", out]) == 2
    assert "at least one --sparsity" in capsys.readouterr().err
    assert not Path(out).exists()


@pytest.mark.parametrize(
    "more",
    [
        ["m"], ["--seqlen", "1024"], ["--seed", "0"], ["--method", "cfsp"],
        ["--data", "t"], ["--sparsity", "0.5"], ["--windows", "12"], ["--speed"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_nothing_that_a_recipe_decides_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert main(["sweep", *more, "--recipe", "r.toml", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "r.toml decides" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval", "nothing.txt"], "nothing.txt is neither a file nor a known text"),
        (["--data", "nothing.txt"], "nothing.txt is neither a file nor a known text"),
        (["--windows", "9999"], "9999 are needed"),
        (["--sparsity", "0.99"], "can be removed"),
        (["--device", "nowhere"], "nowhere"),
        (["--samples", "0"], "expected at least one window"),
    ],
)
def test_all_that_is_named_is_checked_before_anything_is_computed(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was run")

    for name in ("evaluate_models", "calibrate_source", "prune_checkpoint"):
        monkeypatch.setattr(f"cfsp.sweep.run.{name}", never)
    model, out = tiny_checkpoint("llama"), tmp_path / "made" / "out"
    capsys.readouterr()  # a model that is saved here for the first time shows its progress
    arguments = [
        "sweep", str(model), "--sparsity", "0.5", "--multiple", "4",
        "--seqlen", "32", "--data", str(text_file), "--eval", str(text_file), "--out", str(out),
    ]  # fmt: skip
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.parent.exists()


@pytest.fixture(scope="module")
def drawn(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[str], Path]:
    """The arguments of a sweep of two methods by two draws, and its directory."""
    directory = tmp_path_factory.mktemp("drawn")
    method = {
        "name": "by sensitivity", "block_metric": "sensitivity",
        "channel_metric": "eq8", "repair": "none",
    }  # fmt: skip
    recipe = Recipe(
        str(tiny_checkpoint("llama")), (0.5,), (METHODS["cfsp-plain"], method), multiple=4,
        data=(str(text_file),), samples=4, seqlen=32, seed=(0, 1), eval=(str(text_file),),
        windows=2,
    )  # fmt: skip
    (directory / "recipe.toml").write_text(recipe.to_toml())
    arguments = [
        *("sweep", "--recipe", str(directory / "recipe.toml")),
        *("--out", str(directory / "out")),
    ]
    assert main(arguments) == 0
    return arguments, directory / "out"


def test_every_seed_is_a_calibration_of_its_own(
    drawn: tuple[list[str], Path], text_file: Path
) -> None:
    _, out = drawn
    plans = [
        PruningPlan.load(out / f"by sensitivity-0.5-seed{seed}" / "cfsp_plan.json")
        for seed in (0, 1)
    ]
    assert [plan.calibration["seed"] for plan in plans] == [0, 1]
    assert plans[0].criterion["channel_metric"] == "eq8"
    quality, difference = (out / "table.md").read_text().split("\n\n|")[1:]
    assert "| by sensitivity | 50% | 2 |" in quality
    assert "percent above that of cfsp-plain by the same draw" in quality
    assert "| by sensitivity | 50% | 2 |" in difference
    assert "cfsp-plain" not in difference


def test_only_what_was_measured_alike_is_compared(
    drawn: tuple[list[str], Path], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = drawn
    assert main([*arguments, "--dtype", "bfloat16"]) == 2
    assert "something else than was asked for now (other dtypes)" in capsys.readouterr().err
    path = out / "cfsp-plain-0.5-seed0" / "cfsp.json"
    whole = path.read_text()
    manifest = json.loads(whole)
    manifest["perplexity"][str(text_file)]["bos"] = True
    path.write_text(json.dumps(manifest))
    assert main(arguments) == 2
    assert "was not measured as the dense model" in capsys.readouterr().err
    path.write_text(whole)


def test_a_model_is_not_said_to_be_measured_as_an_older_dense_one_was(
    drawn: tuple[list[str], Path], text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, out = drawn
    made = out / "cfsp-plain-0.5-seed0"
    whole = (out / "dense.json").read_text()
    found = json.loads(whole)
    found["models"][0]["perplexity"][str(text_file)]["bos"] = True
    (out / "dense.json").write_text(json.dumps(found))
    shutil.rmtree(made)
    assert main(arguments) == 2
    assert f"{made} was not measured as the dense model" in capsys.readouterr().err
    (out / "dense.json").write_text(whole)


def row(method: str | None, seed: int | None, value: float, speed: float | None = 1.5) -> Row:
    perplexity = {"text": {"value": value, "windows": 2, "seqlen": 32, "bos": False}}
    parameters = 50 if method else 100
    return Row("name", method, 0.5, seed, parameters, perplexity, {"decode": speed})


def test_differences_are_those_of_the_same_draw() -> None:
    dense = replace(row(None, None, 5.0, 1.0), sparsity=0.0)
    rows = [row("a", 0, 10.0), row("a", 1, 20.0), row("b", 0, 11.0), row("b", 1, 18.0, None)]
    quality, difference = tables([dense, *rows])
    assert quality.head[-2:] == ["decode speed-up", "front"]
    speeds = [line[-2] for line in quality.rows]
    assert speeds == ["1.00", "1.50 (1.50 to 1.50)", "too busy"]
    assert quality.rows[1][:5] == ["a", "50%", "2", "50.0%", "15.00 (10.00 to 20.00)"]
    assert difference.rows == [["b", "50%", "2", "0.00 (-10.00 to 10.00)"]]
    assert len(tables([dense, rows[0], rows[2]])) == 1


def test_loss_rise_is_in_nats() -> None:
    before = {"a": 10.0, "b": 20.0}
    assert loss_rise({"a": 20.0, "b": 20.0}, before) == pytest.approx(math.log(2) / 2)


def test_a_method_is_a_name_or_a_part() -> None:
    assert method_named("cfsp-published") is METHODS["cfsp-published"]
    assert method_named("kv") == {"name": "kv", "parts": ("kv",)}
    with pytest.raises(UsageError, match=r"unknown method 'fnn'.*known are: cfsp, .*--parts"):
        method_named("fnn")


def test_parts_are_pruned_as_alone(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    out, model = tmp_path / "out", str(tiny_checkpoint("llama"))
    # So few windows that all are those of the coarse pass.
    asked = ["--data", str(text_file), "--samples", "8", "--seqlen", "32", "--sparsity", "0.3"]
    asked += ["--set", "multiple=8"]
    methods = ["kv", "blocks"]
    measured = ["--eval", str(text_file), "--windows", "1", "--method", *methods]
    assert main(["sweep", model, *asked, *measured, "--out", str(out)]) == 0
    _dense, *rows = json.loads((out / "table.json").read_text())
    assert [row["method"] for row in rows] == methods
    for part in methods:
        alone = tmp_path / part
        assert main(["prune", model, *asked, "--parts", part, "--out", str(alone)]) == 0
        chosen, expected = (
            PruningPlan.load(place / "cfsp_plan.json") for place in (out / f"{part}-0.3", alone)
        )
        assert chosen.kept_channels == expected.kept_channels
        assert chosen.removed_blocks == expected.removed_blocks


def test_several_parts_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr("cfsp.sweep.run.evaluate_models", never)
    argv = ["sweep", "no-model", "--sparsity", "0.3", "--method", "ffn,blocks", "--eval", "t"]
    assert main([*argv, "--data", "t", "--out", str(tmp_path / "out")]) == 2
    assert "several share one target" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

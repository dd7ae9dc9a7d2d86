"""Each study's smallest version runs on a tiny model, and its arithmetic is right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "studies"))

import architectures
import block_ranking
import flap
import parts
import run as runner
import stability
import study
from cfsp.errors import OutputError
from cfsp.pipeline import calibrate_source
from cfsp.settings import Budget, CalibrationText, Compute
from cfsp.sweep.measured import Row
from cfsp.sweep.recipe import read_recipe
from cfsp.sweep.run import run_sweep
from cfsp.sweep.table import tables
from damage import rank_correlation
from recipe import Recipe, read_recipes, recipe_of
from results import Results, table
from subject import label, load_subject

SMALL = ["--seqlen", "32", "--windows", "2"]


@pytest.fixture
def texts(text_file: Path, other_text_file: Path) -> list[str]:
    return ["--data", str(text_file), "--eval", str(text_file), "--eval", str(other_text_file)]


@pytest.fixture
def run(
    texts: list[str],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """Run a study on a tiny Llama; return its rows and what it printed."""

    def run(study: Any, *more: str, samples: int = 4) -> tuple[list[dict[str, Any]], str]:
        out = tmp_path / "rows.json"
        model = ["--model", str(tiny_checkpoint("llama"))]
        study.main([*texts, *model, *SMALL, "--samples", str(samples), "--out", str(out), *more])
        return json.loads(out.read_text())["rows"], capsys.readouterr().out

    return run


def test_block_ranking(run: Callable[..., Any]) -> None:
    rows, printed = run(block_ranking, "--groups", "1", "--draws", "2", "--alone-windows", "1")
    groups = [row for row in rows if row["what"] == "group"]
    assert [row["blocks"] for row in groups] == [
        "least important",
        "most important",
        "most important but the first",
        "random",
        "random",
    ]
    assert [row["size"] for row in rows if row["what"] == "group"] == [1] * 5
    alone = [row for row in rows if row["what"] == "alone"]
    angular = [row["angular"] for row in alone]
    assert groups[0]["indices"] == [int(np.argmin(angular))]
    assert groups[1]["indices"] == [int(np.argmax(angular))]
    assert "| angular |" in printed


def test_flap(run: Callable[..., Any]) -> None:
    rows, printed = run(flap, "--sparsity", "0.34", "0.67")
    assert [row["sparsity"] for row in rows] == [0.34, 0.67]
    assert "| flap | 67% |" in printed


def test_flap_keeps_the_best_of_all_blocks_and_the_mean_of_the_rest(
    text_file: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    subject = load_subject(tiny_checkpoint("llama"), [str(text_file)], 1, 32)
    statistics = subject.calibrate(CalibrationText((str(text_file),), 4, 32))
    plan = flap.plan_of(subject, statistics, Budget(0.5, multiple=1))
    score_LF = []
    for index, unit in enumerate(statistics.units):
        down = subject.source.read(f"model.layers.{index}.mlp.down_proj.weight").double().numpy()
        score = unit.variance_F.numpy() * (down**2).sum(0)
        score_LF.append((score - score.mean()) / score.std())
    threshold = np.median(np.concatenate(score_LF))
    assert plan.kept_channels == [
        tuple(np.flatnonzero(score > threshold).tolist()) for score in score_LF
    ]
    pruned = flap.with_biases(subject, statistics, plan)
    entry = plan.units[-1]
    gone = np.setdiff1d(np.arange(entry.width), entry.kept)
    expected = down[:, gone] @ statistics.units[-1].mean_F.numpy()[gone]
    bias = pruned.model.layers[-1].mlp.down_proj.bias.detach().numpy()
    np.testing.assert_allclose(bias, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("models_start_quickly")
def test_parts(run: Callable[..., Any], tmp_path: Path) -> None:
    options = ("--models", str(tmp_path / "models"), "--stays", "0.6")
    rows, printed = run(parts, *options, "--choices", "ffn", "all", "--rounds", "1")
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


def test_stability(run: Callable[..., Any], other_text_file: Path) -> None:
    rows, _ = run(
        stability,
        *("--data", str(other_text_file), "--parts", "1", "--judge-every", "2"),
        samples=4,
    )
    compared = [row for row in rows if row["what"] == "stability"]
    assert [(row["size"], row["pairs"]) for row in compared] == [(1, 6), (2, 1)] * 2
    assert all(0 < row["lowest"] <= row["overlap"] <= 1 for row in compared)
    assert sum(row["what"] == "texts" for row in rows) == 1
    assert sum(row["what"] == "quality" for row in rows) == 4


def test_architectures(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, models = tmp_path / "rows.json", tmp_path / "models"
    arguments = [
        *(*texts, *SMALL, "--samples", "4", "--out", str(out), "--models", str(models)),
        *("--hidden", "32", "--blocks", "2", "--vocabulary", "300", "--tokens", "4000"),
        *("--seeds", "1", "--sparsity", "0.5", "--blocks-by", "angular", "angular+sensitivity"),
    ]
    architectures.main(arguments)
    rows = json.loads(out.read_text())["rows"]
    dense = {row["architecture"] for row in rows if row["what"] == "dense"}
    assert dense == set(architectures.ARCHITECTURES)
    assert sum(row["what"] == "alone" for row in rows) == 2 * len(dense)
    assert sum(row["what"] == "pruned" for row in rows) == 2 * len(dense)
    printed = capsys.readouterr().out
    assert "| neox-parallel | left out |" in printed


def test_rises_are_compared_on_the_same_model() -> None:
    rows = [
        {"architecture": "llama", "seed": seed, "sparsity": sparsity, "blocks": blocks}
        | {"plain": value, "repaired": value / 2}
        for seed, sparsity, blocks, value in (
            (0, 0.2, "angular", 1.0),
            (1, 0.2, "angular", 2.0),
            (0, 0.2, "uniform", 1.5),
            (1, 0.2, "uniform", 1.5),
            (1, 0.5, "uniform", 3.0),
        )
    ]
    found = architectures.by_sparsity(architectures.above_default(rows))
    assert [row["20%"] for row in found] == [0.5, -0.5]
    assert [row["20%, repaired"] for row in found] == [0.25, -0.25]
    # Nothing to compare with.
    assert not any("50%" in row for row in found)


def test_parts_of_a_calibration_add_up(
    text_file: Path, tiny_checkpoint: Callable[[str], Path]
) -> None:
    subject = load_subject(tiny_checkpoint("llama"), [str(text_file)], 1, 32)
    text = CalibrationText((str(text_file),), 4, 32)
    whole = calibrate_source(subject.source, subject.tokenizer, text, Compute())
    sums = stability.added(stability.one_by_one(subject, text))
    for unit, expected in zip(sums.units, whole.units, strict=True):
        # Batches of another size round differently.
        torch.testing.assert_close(
            unit.sum_of_squares_F, expected.sum_of_squares_F, rtol=1e-5, atol=1e-5
        )
    for block, expected in zip(sums.blocks, whole.blocks, strict=True):
        assert block.distances == pytest.approx(expected.distances)
    assert stability.sizes(9) == [1, 2, 4]
    assert list(stability.judged(32, 4)) == [1, 4, 16, 32]
    plan = subject.plan(whole, 0.5)
    assert stability.overlap(plan, plan) == 1
    assert stability.overlap(plan, subject.plan(sums, 0.5)) == 1
    assert stability.moved(plan, plan) == 0


def test_rank_correlation_is_that_of_the_ranks() -> None:
    first, second = [3.0, 1.0, 4.0, 1.0, 5.0], [2.0, 7.0, 1.0, 8.0, 2.0]
    ranks = [2, 0.5, 3, 0.5, 4], [1.5, 3, 0, 4, 1.5]
    assert rank_correlation(first, second) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert rank_correlation(first, first) == pytest.approx(1)
    assert rank_correlation(first, [1.0] * 5) == 0


@pytest.fixture
def directory_of_texts(tmp_path: Path) -> Path:
    """A directory that has the files that recipes name; nobody reads them."""
    for recipe in read_recipes():
        for name in recipe.files:
            path = tmp_path / "texts" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return tmp_path / "texts"


@pytest.mark.parametrize("recipe", read_recipes(), ids=lambda recipe: recipe.study)
def test_recipe_prints_what_is_published(
    recipe: Recipe,
    directory_of_texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a published row is missing")

    for module in (architectures, study):
        monkeypatch.setattr(module, "load_subject", never)
    monkeypatch.setattr(architectures, "trained", never)
    assert runner.main([recipe.study, "--texts", str(directory_of_texts)]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    published = (REPOSITORY / "docs/STUDIES.md").read_text().splitlines()
    assert printed
    assert not set(printed) - set(published)
    command = f"python studies/run.py {recipe.study} --texts DIR"
    for place in ("docs/STUDIES.md", "studies/README.md", f"studies/{recipe.program}.py"):
        assert command in (REPOSITORY / place).read_text(), place


SWEEPS = sorted((REPOSITORY / "studies/sweeps").glob("*.toml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_what_is_published_is_what_the_sweep_makes(path: Path) -> None:
    recipe = read_recipe(path)
    stored = json.loads((REPOSITORY / f"studies/results/{path.stem}.json").read_text())
    dense, *rows = [Row(**row) for row in stored]
    assert [(row.name, row.seed) for row in rows] == [(p.name, p.seed) for p in recipe.points]
    assert {len(row.perplexity) for row in rows} == {len(recipe.eval)}
    for row in [dense, *rows]:
        for text, found in row.perplexity.items():
            assert text in recipe.eval
            assert found["windows"] == recipe.eval_windows
            assert found["seqlen"] == recipe.seqlen
    published = (REPOSITORY / "docs/STUDIES.md").read_text()
    for each in tables([dense, *rows]):
        assert each.to_markdown().partition("\n\n")[2] in published
    for place in ("docs/STUDIES.md", "studies/README.md"):
        assert f"sweeps/{path.name}" in (REPOSITORY / place).read_text(), place


def test_the_recipe_of_the_benchmarks_is_one() -> None:
    assert len(read_recipe(REPOSITORY / "benchmarks/criteria.toml").points) == 12


def test_a_published_sweep_runs(
    text_file: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = replace(
        read_recipe(SWEEPS[0]),
        model=str(tiny_checkpoint("llama")),
        data=(str(text_file),),
        eval=(str(text_file),),
        seqlen=32,
        samples=4,
        eval_windows=2,
        multiple=4,
    )
    rows = run_sweep(recipe, tmp_path / "out", Compute())
    assert [row.method for row in rows] == [None, "relative", "magnitude", "by chance"]


def test_a_recipe_runs(
    text_file: Path,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (f"DIR/{text_file.name}",)
    recipe = replace(recipe_of("8"), data=text, eval=text)
    monkeypatch.setattr(runner, "recipe_of", lambda _: recipe)
    out = tmp_path / "rows.json"
    small = ["--model", str(tiny_checkpoint("llama")), *SMALL, "--samples", "4"]
    command = ["8", "--texts", str(text_file.parent), "--out", str(out), *small]
    assert runner.main([*command, "--sparsity", "0.34"]) == 0
    assert [row["sparsity"] for row in json.loads(out.read_text())["rows"]] == [0.34]
    assert "| flap | 34% |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("2", "there is no study '2'; known are: 1, 5, 6, 7, 8, 9, 10"),
        ("7", "wikitext2/validation.parquet, which is not there; --texts is a directory with"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    study: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main([study, "--texts", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("studies/run.py: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_results_are_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    results = Results(path, {"windows": 2})
    results.measure({"seed": 0}, lambda: {"value": 1.0})
    results.measure({"seed": 1}, lambda: {"value": 2.0})

    def never() -> dict[str, float]:
        raise AssertionError

    again = Results(path, {"windows": 2})
    assert again.measure({"seed": 1}, never) == {"seed": 1, "value": 2.0}
    assert table(again.rows, [], ["value"]).splitlines()[-1] == "| 2 | 1.5 (1.0 to 2.0) |"
    assert table(again.rows, [], ["other"]).splitlines()[-1] == "| 2 |  |"
    with pytest.raises(OutputError, match="other conditions"):
        Results(path, {"windows": 3})


def test_labels_hide_paths(text_file: Path) -> None:
    assert label(str(text_file)) == f"{text_file.parent.name}/prose"
    assert label("wikitext2") == "wikitext2"

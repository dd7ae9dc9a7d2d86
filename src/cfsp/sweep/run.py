"""The flow of a sweep: one calibration -> many plans -> each pruned, measured, compared.

A sweep's directory holds `recipe.toml`, the statistics, and a directory for each model: what
`cfsp prune` writes, without the weights unless they are to be kept. A model whose directory is
there is not made again, so a sweep that was interrupted goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import (
    check_is_outside,
    created_parents,
    exclusive,
    remove_abandoned,
    write_atomically,
)
from cfsp.checkpoint.own_files import STATISTICS_FILE, statistics_in
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.engine.workplace import output_workplace, remove_finished_work
from cfsp.errors import CfspError, OutputError
from cfsp.pipeline import calibrate_source, prune_checkpoint
from cfsp.progress import item_progress
from cfsp.quality.evaluate import evaluate_models
from cfsp.result.manifest import add_to_manifest, read_manifest
from cfsp.settings import Compute, PruneSettings
from cfsp.sweep.methods import method
from cfsp.sweep.recipe import Point, Recipe
from cfsp.text.sources import check_texts
from cfsp.text.tokenizers import load_tokenizer

RECIPE_FILE = "recipe.toml"
_DENSE_FILE = "dense.json"
_WORKING = ".working"


@dataclass(frozen=True)
class Row:
    """One model of a finished sweep; the first of a table is the dense one.

    Attributes:
        name: what it is called.
        method: how it was pruned; None for the dense model.
        sparsity: fraction that was asked for.
        parameters: of the model.
        perplexity: by text.
        speed: phase -> ratio to the dense model; empty if it was not timed.
        directory: what `cfsp report` reads; None for the dense model.
    """

    name: str
    method: str | None
    sparsity: float
    parameters: int
    perplexity: dict[str, float]
    speed: dict[str, float]
    directory: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {**vars(self), "directory": str(self.directory) if self.directory else None}


def run_sweep(
    recipe: Recipe,
    out: Path,
    compute: Compute,
    *,
    keep_weights: bool = False,
    command: str = "",
) -> list[Row]:
    """Make every model of a recipe that is not there yet, and return the whole table.

    Args:
        recipe: what to do.
        out: the sweep's directory, new or of the same recipe.
        compute: where and in what.
        keep_weights: keep the pruned models' weights.
        command: what the user typed, for the manifests.

    Raises:
        CfspError: anything that a user can cause; models that are finished stay.
    """
    check_texts(recipe.text.names, "calibration")
    check_texts(recipe.evaluation.names, "evaluation")
    source = open_checkpoint(recipe.model)
    check_is_outside(out, source.directory)
    with created_parents(out), exclusive(out), _kept(out, recipe):
        return _run(recipe, source, out, compute, keep_weights, command)


@contextmanager
def _kept(out: Path, recipe: Recipe) -> Iterator[None]:
    """Say that an interrupted sweep goes on; leave nothing of one that a mistake ended at once."""
    is_new = not any(out.iterdir())
    try:
        yield
    except BaseException as error:
        finished = any((out / point.name).is_dir() for point in recipe.points)
        if isinstance(error, CfspError) and not error.keeps_work:
            if is_new and not finished:
                for name in (RECIPE_FILE, _DENSE_FILE, STATISTICS_FILE):
                    (out / name).unlink(missing_ok=True)
        elif (out / RECIPE_FILE).is_file() and not isinstance(error, CfspError):
            print(
                f"what is finished is kept in {out}; the same command goes on from it",
                file=sys.stderr,
            )
        raise


def _run(
    recipe: Recipe,
    source: Checkpoint,
    out: Path,
    compute: Compute,
    keep_weights: bool,
    command: str,
) -> list[Row]:
    _claim(out, recipe)
    dense = _dense(recipe, source, out, compute)
    missing = [point for point in recipe.points if not (out / point.name).is_dir()]
    if missing:
        statistics = _statistics(recipe, source, out, compute)
        with item_progress("sweep", len(missing), "model") as bar:
            for point in missing:
                with _working_directory(out) as working:
                    _make(recipe, point, source, statistics, working, compute, dense, command)
                    if not keep_weights:
                        _remove_weights(working)
                    working.rename(out / point.name)
                bar.update()
    return [dense, *(_row(point, out / point.name) for point in recipe.points)]


def _claim(out: Path, recipe: Recipe) -> None:
    """Write down which recipe the directory is for.

    Raises:
        OutputError: it is for another one, or holds something else.
    """
    path, text = out / RECIPE_FILE, recipe.to_toml()
    remove_abandoned(path)
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise OutputError(
                f"{out} holds a sweep of another recipe ({path}); choose another --out, or give "
                f"--recipe {path} to go on with it"
            )
        return
    if out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} exists, is not empty and is no sweep; choose another --out")
    write_atomically(path, text.encode())


def _dense(recipe: Recipe, source: Checkpoint, out: Path, compute: Compute) -> Row:
    path = out / _DENSE_FILE
    if not path.is_file():
        measured = evaluate_models([source.directory], recipe.evaluation, compute)[0]
        perplexity = {text: found["value"] for text, found in measured["perplexity"].items()}
        write_atomically(path, json.dumps({"perplexity": perplexity}, indent=2).encode())
    found = json.loads(path.read_text(encoding="utf-8"))
    speed = {"prefill": 1.0, "decode": 1.0} if recipe.speed else {}
    return Row("dense", None, 0.0, parameter_count(source), found["perplexity"], speed, None)


def _statistics(recipe: Recipe, source: Checkpoint, out: Path, compute: Compute) -> Statistics:
    path = statistics_in(out) or out / STATISTICS_FILE
    remove_finished_work(path)
    if not path.is_file():
        tokenizer = load_tokenizer(source.directory)
        with output_workplace(path, {"command": "sweep"}, compute.memory_budget) as place:
            calibrate_source(source, tokenizer, recipe.text, compute, place).save(path)
    return Statistics.load(path)


def _make(
    recipe: Recipe,
    point: Point,
    source: Checkpoint,
    statistics: Statistics,
    out: Path,
    compute: Compute,
    dense: Row,
    command: str,
) -> None:
    """Prune and measure one model."""
    chosen = method(point.method)
    settings = PruneSettings(
        recipe.budget(point), chosen.criterion, recipe.text, compute, chosen.restore
    )
    prune_checkpoint(source, out, settings, statistics=statistics, command=command)
    measured = evaluate_models([out], recipe.evaluation, compute)[0]
    facts: dict[str, Any] = {
        "perplexity": {
            text: {
                "before": dense.perplexity[text],
                "after": found["value"],
                **{name: value for name, value in found.items() if name != "value"},
            }
            for text, found in measured["perplexity"].items()
        },
        "sweep": {"method": point.method, "sparsity": point.sparsity},
    }
    if recipe.speed:
        facts["speed"] = _speed(source.directory, out)
    add_to_manifest(out, facts)


@contextmanager
def _working_directory(out: Path) -> Iterator[Path]:
    """Give a place for one model, empty even after a kill."""
    working = out / _WORKING
    shutil.rmtree(working, ignore_errors=True)
    try:
        yield working
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _speed(dense: Path, pruned: Path) -> dict[str, Any]:
    from cfsp.speed import Conditions, Workload, compare_speed
    from cfsp.speed.subjects import Subject

    subjects = [Subject(dense, "dense"), Subject(pruned, "pruned")]
    return compare_speed(subjects, [Workload(prompt=128)], Conditions(rounds=5)).to_json()


def _remove_weights(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        path.unlink()


def _row(point: Point, directory: Path) -> Row:
    manifest = read_manifest(directory)
    if manifest is None or "sweep" not in manifest:
        raise OutputError(f"{directory} is no model of a sweep; delete it and run the sweep again")
    speed: dict[str, float] = {}
    if "speed" in manifest:
        workload = manifest["speed"]["models"][1]["workloads"][0]
        speed = {phase: workload[phase]["ratio"] for phase in ("prefill", "decode")}
    return Row(
        point.name,
        point.method,
        point.sparsity,
        int(manifest["parameters_after"]),
        {text: value["after"] for text, value in manifest["perplexity"].items()},
        speed,
        directory,
    )

"""The flow of a sweep: calibrate once a seed -> many plans -> each pruned, measured, compared.

A sweep's directory holds `recipe.toml`, the statistics of each seed, and a directory for each
model: what `cfsp prune` writes, without the weights unless they are to be kept. A model whose
directory is there is not made again, so a sweep that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from cfsp.checkpoint.own_files import RECIPE_FILE
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.engine.compute import engine_of
from cfsp.engine.whole import check_fits
from cfsp.engine.workplace import output_workplace, remove_finished_work
from cfsp.errors import CfspError, OutputError
from cfsp.pipeline import calibrate_source, prune_checkpoint
from cfsp.planning.numbers_to_try import whole_alone
from cfsp.progress import item_progress
from cfsp.quality.evaluate import evaluation_windows
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.repair.ladder import check_budget, check_can_be_repaired
from cfsp.result.manifest import add_to_manifest
from cfsp.settings import Compute, Part
from cfsp.sweep.measured import (
    Row,
    check_conditions,
    measure_dense,
    measure_pruned,
    measure_speed,
    read_row,
)
from cfsp.sweep.recipe import Point, Recipe
from cfsp.text.calibration_text import processor_of
from cfsp.text.drawing import draw_text
from cfsp.text.sources import check_texts
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows
from cfsp.whole_model.removal_order import check_can_be_compared
from cfsp.whole_model.sensitivity import follow_sensitivity

logger = logging.getLogger(__name__)

_DENSE_FILE = "dense.json"
_WORKING = ".working"


@dataclass(frozen=True)
class _Sweep:
    """What a sweep is made of; see `run_sweep`.

    Attributes:
        source: the model, opened with the parts of all methods: it is calibrated.
        source_by: the model as `cfsp prune` opens it, by the parts that may go.
    """

    recipe: Recipe
    source: Checkpoint
    source_by: Mapping[tuple[Part, ...], Checkpoint]
    out: Path
    compute: Compute
    keep_weights: bool
    command: str
    tasks: TaskRunner | None

    def is_finished(self, point: Point) -> bool:
        """Return whether a model is there, with its weights if they are to be kept."""
        directory = self.out / point.name
        return directory.is_dir() and (not self.keep_weights or bool(_weights(directory)))


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
    check_texts(recipe.data, "calibration")
    check_texts(recipe.eval, "evaluation")
    selection = recipe.task_selection
    tasks = None if selection is None else TaskRunner.of(selection)
    parts: tuple[Part, ...] = tuple({p: None for method in recipe.methods for p in method.parts})
    source = open_checkpoint(recipe.model, parts=parts)
    source_by = {
        each: source if each == parts else open_checkpoint(recipe.model, parts=each)
        for each in dict.fromkeys(method.parts for method in recipe.methods)
    }
    check_is_outside(out, source.directory)
    with created_parents(out), exclusive(out), _kept(out, recipe):
        _claim(out, recipe)
        sweep = _Sweep(recipe, source, source_by, out, compute, keep_weights, command, tasks)
        missing = [point for point in recipe.points if not sweep.is_finished(point)]
        if missing:
            _check(sweep)
        measured = _dense(sweep)
        if missing:
            with item_progress("sweep", len(missing), "model") as bar:
                for point in missing:
                    _make(sweep, point, measured)
                    bar.update()
        rows = [
            _dense_row(sweep, measured),
            *(read_row(point, out / point.name) for point in recipe.points),
        ]
        check_conditions(rows, out)
        return rows


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
                for path in (out / RECIPE_FILE, out / _DENSE_FILE, *_statistics_files(out)):
                    path.unlink(missing_ok=True)
        elif (out / RECIPE_FILE).is_file() and not isinstance(error, CfspError):
            logger.info("what is finished is kept in %s; the same command goes on from it", out)
        raise


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


def _check(sweep: _Sweep) -> None:
    """Check all that the recipe names before the first forward pass.

    Raises:
        CfspError: a text is too short, no plan meets a budget, or there is no such device.
    """
    recipe, source = sweep.recipe, sweep.source
    engine, tokenizer = engine_of(sweep.compute, source), load_tokenizer(source.directory)
    for point in recipe.points:
        settings, own = recipe.settings(point, sweep.compute), sweep.source_by[point.method.parts]
        check_budget(own, settings.budget)
        check_can_be_compared(own, [settings], engine)
        check_can_be_repaired(own, settings)
    evaluation_windows(recipe.evaluation, source)
    if sweep.tasks is not None:
        check_fits(source, engine, "scoring tasks")
        sweep.tasks.read_data()
    draw_text(recipe.text(recipe.seed[0]), tokenizer, processor_of(source))


def _dense(sweep: _Sweep) -> dict[str, Any]:
    """Return what was measured of the dense model, now or when the sweep began."""
    path, dtype = sweep.out / _DENSE_FILE, str(engine_of(sweep.compute, sweep.source).dtype)
    if not path.is_file():
        measured = measure_dense(sweep.source, sweep.recipe, sweep.compute, sweep.tasks)
        write_atomically(path, json.dumps({**measured, "dtype": dtype}).encode())
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found["dtype"] != dtype:
        before, now = (name.removeprefix("torch.") for name in (found["dtype"], dtype))
        raise OutputError(
            f"{sweep.out} holds a sweep that computes in {before}, this one computes in {now}; "
            f"give --dtype {before} or another --out"
        )
    return found


def _dense_row(sweep: _Sweep, measured: dict[str, Any]) -> Row:
    speed = {"prefill": 1.0, "decode": 1.0} if sweep.recipe.speed else {}
    parameters = parameter_count(sweep.source)
    return Row("dense", None, 0.0, None, parameters, measured["perplexity"], speed, None)


def _statistics_files(out: Path) -> list[Path]:
    return list(out.glob("seed-*.statistics"))


def _statistics(sweep: _Sweep, seed: int) -> Statistics:
    path, source, compute = (
        sweep.out / f"seed-{seed}.statistics",
        sweep.source,
        sweep.compute,
    )
    remove_finished_work(path)
    if not path.is_file():
        tokenizer, text = load_tokenizer(source.directory), sweep.recipe.text(seed)
        engine = engine_of(compute, source)
        settings = [sweep.recipe.settings(point, compute) for point in sweep.recipe.points]

        def needs_sensitivity(windows: Windows) -> bool:
            return any(
                follow_sensitivity(
                    source,
                    each.suited_to_repair().criterion,
                    engine,
                    has_images=windows.has_images,
                )
                for each in settings
                if each.budget.removes_channels
            )

        with output_workplace(path, {"command": "sweep"}, compute.memory_budget) as place:
            found = calibrate_source(
                source,
                tokenizer,
                text,
                compute,
                place,
                sensitivity=needs_sensitivity,
                removing=[
                    replace(each, budget=whole_alone(source, each.budget)) for each in settings
                ],
            )
            found.save(path)
    return Statistics.load(path)


def _make(sweep: _Sweep, point: Point, dense: dict[str, Any]) -> None:
    """Prune and measure one model."""
    recipe, source, compute = sweep.recipe, sweep.source, sweep.compute
    statistics = _statistics(sweep, point.seed)
    with _working_directory(sweep.out) as working:
        settings, own = recipe.settings(point, compute), sweep.source_by[point.method.parts]
        prune_checkpoint(
            own,
            working,
            settings,
            statistics=statistics.of_units({unit.part for unit in own.units}),
            command=sweep.command,
        )
        facts: dict[str, Any] = {
            **measure_pruned(working, source, dense, recipe, compute, sweep.tasks),
            "sweep": {
                "method": point.method.name,
                "sparsity": point.sparsity,
                "seed": point.seed,
            },
        }
        if recipe.speed:
            facts["speed"] = measure_speed(source.directory, working)
        add_to_manifest(working, facts)
        if not sweep.keep_weights:
            for path in _weights(working):
                path.unlink()
        finished = sweep.out / point.name
        shutil.rmtree(finished, ignore_errors=True)  # one that kept no weights
        working.rename(finished)


@contextmanager
def _working_directory(out: Path) -> Iterator[Path]:
    """Give a place for one model, empty even after a kill."""
    working = out / _WORKING
    shutil.rmtree(working, ignore_errors=True)
    try:
        yield working
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _weights(directory: Path) -> list[Path]:
    return list(directory.glob("*.safetensors"))

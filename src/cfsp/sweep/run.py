"""The flow of a sweep: calibrate once, then prune and measure each of a list of settings.

A sweep's directory holds `sweep.json`, the statistics, and a directory for each model: what `cfsp
prune` writes, without the weights; `cfsp prune --plan` makes them again. A model whose directory is
there is not made again, so a sweep that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
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
from cfsp.checkpoint.own_files import STATISTICS_FILE, SWEEP_FILE
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.errors import CfspError, OutputError
from cfsp.pipeline import calibrate_source, prune_checkpoint
from cfsp.progress import item_progress
from cfsp.quality.answers import Questions
from cfsp.quality.compare import compare
from cfsp.quality.evaluate import Dense, evaluate_models
from cfsp.quality.perplexity import before_and_after
from cfsp.quality.results_file import measured_model
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.quality.tasks.selection import TaskSelection
from cfsp.repair.ladder import check_can_be_repaired
from cfsp.result.manifest import add_to_manifest
from cfsp.selection.constraint import Share
from cfsp.settings import Compute, Part
from cfsp.streaming.memory import default_budget
from cfsp.streaming.work_dir import output_work_dir, remove_finished_work, temporary_work_dir
from cfsp.sweep.settings import Point, SweepSettings
from cfsp.sweep.table import Row, read_rows
from cfsp.text.drawing import draw_text, processor_of
from cfsp.text.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

_DENSE_FILE = "dense.json"
_WORKING = ".working"


@dataclass(frozen=True)
class _Sweep:
    """What a sweep is made of; see `run_sweep`."""

    settings: SweepSettings
    points: Sequence[Point]
    source: Checkpoint  # opened with the parts of all methods: it is calibrated
    opened: Callable[[tuple[Part, ...]], Checkpoint]  # as `cfsp prune` opens it for a point
    out: Path
    compute: Compute
    tasks: TaskRunner | None
    questions: Questions | None


def run_sweep(
    settings: SweepSettings, out: Path, compute: Compute, *, command: str = ""
) -> list[Row]:
    """Make every model of a sweep that is not there yet, and return the whole table."""
    tasks, questions, points = None, None, settings.points(compute)
    if settings.tasks:
        data = None if settings.task_data is None else Path(settings.task_data)
        tasks = TaskRunner.of(TaskSelection(tuple(settings.tasks), settings.limit, data=data))
    if settings.answers is not None:
        questions = Questions.of(settings.answers)
    opened = cache(lambda parts: open_checkpoint(settings.model, parts=parts))
    asked = dict.fromkeys(part for point in points for part in point.settings.budget.parts)
    sweep = _Sweep(settings, points, opened(tuple(asked)), opened, out, compute, tasks, questions)
    check_is_outside(out, sweep.source.directory)
    with created_parents(out), exclusive(out), _kept(sweep):
        _claim(out, settings)
        missing = [point for point in points if not (out / point.name).is_dir()]
        if missing:
            _check(sweep)
        budget = compute.memory_budget or default_budget()
        with temporary_work_dir(budget // (4 * (len(settings.eval) + 1))) as passes:
            dense = Dense(sweep.source, {}, passes)
            names = () if settings.compares else (sweep.source.directory,)
            (found,) = _evaluated(sweep, names, dense, out / _DENSE_FILE)
            dense = replace(dense, result=found)
            with item_progress("sweep", len(missing), "model") as bar:
                for point in missing:
                    _make(sweep, point, dense, command)
                    bar.update()
        parameters = parameter_count(sweep.source)
        return read_rows(found, parameters, [(point, out / point.name) for point in points])


def _evaluated(
    sweep: _Sweep, names: Sequence[Path], dense: Dense, out: Path | None = None
) -> list[dict[str, Any]]:
    """Measure models as the sweep asks for; beside the dense one if that is asked."""
    return evaluate_models(
        names,
        sweep.settings.evaluation,
        sweep.compute,
        sweep.tasks,
        questions=sweep.questions,
        against=dense if sweep.settings.compares else None,
        out=out,
    )


@contextmanager
def _kept(sweep: _Sweep) -> Iterator[None]:
    """Say that an interrupted sweep goes on; leave nothing of one that a mistake ended at once."""
    out, is_new = sweep.out, not any(sweep.out.iterdir())
    try:
        yield
    except CfspError as error:
        finished = any((out / point.name).is_dir() for point in sweep.points)
        if is_new and not finished and not error.keeps_work:
            for name in (SWEEP_FILE, _DENSE_FILE, STATISTICS_FILE):
                (out / name).unlink(missing_ok=True)
        raise
    except BaseException:
        if (out / SWEEP_FILE).is_file():
            logger.info("what is finished is kept in %s; the same command goes on from it", out)
        raise


def _claim(out: Path, settings: SweepSettings) -> None:
    """Write down what the directory is for; refuse one that is for something else."""
    path, text = out / SWEEP_FILE, json.dumps(vars(settings), indent=2) + "\n"
    remove_abandoned(path)
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            raise OutputError(
                f"{out} holds a sweep by other settings ({path}); choose another --out, or repeat "
                "that command to go on with it"
            )
        return
    if any(out.iterdir()):
        raise OutputError(f"{out} exists, is not empty and is no sweep; choose another --out")
    write_atomically(path, text.encode())


def _check(sweep: _Sweep) -> None:
    """Check all that is not checked when the dense model is measured, before that."""
    source, text = sweep.source, sweep.points[0].settings.text
    for point in sweep.points:
        own = sweep.opened(point.settings.budget.parts)
        Share(own, point.settings.budget).check()
        check_can_be_repaired(own, point.settings)
    draw_text(text, load_tokenizer(source.directory), processor_of(source))


def _statistics(sweep: _Sweep) -> Statistics:
    """Return the statistics, with all that any of the settings asks for."""
    path, source, compute = sweep.out / STATISTICS_FILE, sweep.source, sweep.compute
    remove_finished_work(path)
    if path.is_file():
        return Statistics.load(path)
    prunings = [point.settings for point in sweep.points]
    with output_work_dir(path, {"command": "sweep"}, compute.memory_budget) as work_dir:
        tokenizer = load_tokenizer(source.directory)
        found = calibrate_source(source, tokenizer, prunings, work_dir)
        found.save(path)
    return Statistics.load(path)


def _make(sweep: _Sweep, point: Point, dense: Dense, command: str) -> None:
    """Prune and measure one model, in a place that is empty even after a kill."""
    own = sweep.opened(point.settings.budget.parts)
    statistics = _statistics(sweep).of_units({unit.part for unit in own.units})
    working, finished = sweep.out / _WORKING, sweep.out / point.name
    shutil.rmtree(working, ignore_errors=True)
    try:
        prune_checkpoint(own, working, point.settings, statistics=statistics, command=command)
        facts = _measured(sweep, working, dense)
        facts["sweep"] = {"method": point.method, "sparsity": point.settings.budget.sparsity}
        add_to_manifest(working, facts)
        for path in working.glob("*.safetensors"):
            path.unlink()
        working.rename(finished)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _measured(sweep: _Sweep, model: Path, dense: Dense) -> dict[str, Any]:
    """Measure a pruned model as asked; return what its manifest will say of it."""
    settings, before = sweep.settings, dense.result
    found = _evaluated(sweep, [model], dense)[-1]
    perplexity = before_and_after(before["perplexity"], found["perplexity"])
    facts: dict[str, Any] = {"perplexity": perplexity}
    if settings.compares or sweep.tasks is not None:
        first, second = measured_model("dense", before), measured_model("pruned", found)
        facts["comparison"] = compare(first, second, first)
    return facts

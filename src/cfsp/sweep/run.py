"""The flow of a sweep: decide on all of a list of prunings together, then make and measure each.

A sweep's directory holds `sweep.json`, and a directory for each model: what `cfsp prune` writes,
without the weights; `cfsp prune --plan` makes them again. A model whose directory is there is not
made again, so a sweep that was interrupted goes on.
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

from cfsp.checkpoint.locating import given_path, open_checkpoint
from cfsp.checkpoint.output import (
    check_is_outside,
    created_parents,
    exclusive,
    remove_abandoned,
    write_atomically,
)
from cfsp.checkpoint.own_files import SWEEP_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.decide import NOTHING_KNOWN, Known
from cfsp.errors import CfspError, OutputError, damage_as
from cfsp.pipeline import decide_all, digest_of, prune_checkpoint, pruning_identity
from cfsp.progress import item_progress
from cfsp.pruning_cost import doubts, say_doubts
from cfsp.quality.answers import Questions
from cfsp.quality.compare import compare
from cfsp.quality.evaluate import Dense, Exam, evaluate_models
from cfsp.quality.perplexity import before_and_after
from cfsp.quality.results_file import measured_model, read_results
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.quality.tasks.selection import DEFAULT_BATCH, TaskSelection
from cfsp.repair.result import PruningResult
from cfsp.result.manifest import add_to_manifest
from cfsp.selection.constraint import Share
from cfsp.settings import Compute, Part
from cfsp.streaming.memory import hidden_budget
from cfsp.streaming.runtime import runtime_identity, runtime_of
from cfsp.streaming.work_dir import (
    output_work_dir,
    remove_finished_work,
    remove_work,
    temporary_work_dir,
)
from cfsp.sweep.rows import Row
from cfsp.sweep.settings import Point, SweepSettings
from cfsp.text.drawing import draw_text
from cfsp.text.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)

_DENSE_FILE = "dense.json"
_WORKING = ".working"


@dataclass(frozen=True)
class _Sweep:
    """What a sweep is made of; see `run_sweep`."""

    points: Sequence[Point]
    source: Checkpoint  # as it is opened for the first point
    opened: Callable[[tuple[Part, ...]], Checkpoint]  # as `cfsp prune` opens it for a point
    out: Path
    compute: Compute
    exam: Exam


def run_sweep(settings: SweepSettings, out: Path, compute: Compute, *, command: str) -> list[Row]:
    """Make every model of a sweep that is not there yet, and return the whole table."""
    exam, points = Exam(settings.evaluation, compute), settings.points(compute)
    if settings.tasks:
        data = None if settings.task_data is None else given_path(settings.task_data)
        batch = compute.batch_windows or DEFAULT_BATCH
        selection = TaskSelection(tuple(settings.tasks), settings.limit, data=data, batch=batch)
        exam = replace(exam, tasks=TaskRunner.of(selection))
    if settings.answers is not None:
        exam = replace(exam, questions=Questions.of(settings.answers))
    opened = cache(lambda parts: open_checkpoint(settings.model, parts=parts))
    sweep = _Sweep(points, opened(points[0].parts), opened, out, compute, exam)
    check_is_outside(out, sweep.source.directory)
    with created_parents(out), exclusive(out), _kept(sweep):
        windows = _claim(sweep, settings)
        for point in points:
            remove_finished_work(out / point.name)
        missing = [point for point in points if not (out / point.name).is_dir()]
        budget = hidden_budget(compute.memory_budget)
        with temporary_work_dir(budget // (4 * (len(settings.eval) + 1))) as passes:
            dense = Dense(sweep.source, {}, passes)
            (found,) = evaluate_models((), exam, against=dense, out=out / _DENSE_FILE)
            dense, row = replace(dense, result=found), _dense_row(sweep, found)
            _rows(sweep, [point for point in points if point not in missing], row)
            say_doubts(
                doubt
                for point in missing
                for doubt in doubts(sweep.opened(point.parts), point.settings, windows)
            )
            with item_progress("sweep", len(missing), "model") as bar:
                for parts in dict.fromkeys(point.parts for point in missing):
                    to_make = [each for each in missing if each.parts == parts]
                    with _decided(sweep, parts, to_make[-1]) as decided:
                        for point in to_make:
                            _make(sweep, point, decided[point.name], dense, row.measured, command)
                            bar.update()
        return [row, *_rows(sweep, points, row)]


@contextmanager
def _kept(sweep: _Sweep) -> Iterator[None]:
    """Say that an interrupted sweep goes on; leave nothing of one that a mistake ended at once."""
    out, is_new = sweep.out, not any(sweep.out.iterdir())
    try:
        yield
    except CfspError as error:
        finished = any((out / point.name).is_dir() for point in sweep.points)
        has_work = any(path.name != SWEEP_FILE for path in out.iterdir())
        if is_new and not finished and not (has_work and error.keeps_work):
            for name in (SWEEP_FILE, _DENSE_FILE):
                (out / name).unlink(missing_ok=True)
        raise
    except BaseException:
        if (out / SWEEP_FILE).is_file():
            logger.info("what is finished is kept in %s; the same command goes on from it", out)
        raise


def _claim(sweep: _Sweep, settings: SweepSettings) -> int:
    """Write down what the directory is for; refuse one that is for something else.

    The lists may change: each model is made and measured as if it were alone. Returns the number of
    windows to calibrate on.
    """
    out, source = sweep.out, sweep.source
    for point in sweep.points:
        Share(sweep.opened(point.parts), point.settings.budget).check()
    drawn = draw_text(sweep.points[0].settings.text, load_tokenizer(source.directory))
    made_of = {"weights, config or tokenizer": source.identity, "calibration text": drawn.digest}
    path, text = out / SWEEP_FILE, json.dumps({**vars(settings), **made_of}, indent=2) + "\n"
    remove_abandoned(path)
    if path.is_file():
        now = json.loads(text)
        with damage_as(OutputError, path, "choose another --out"):
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        changed = [name for name in now if before.get(name) != now[name]]
        if others := [name for name in changed if name not in ("sparsity", "methods")]:
            raise OutputError(
                f"{out} holds a sweep by other settings ({path}: other {', '.join(others)}); "
                "choose another --out, or repeat that command to go on with it"
            )
        if changed:  # one pass chooses for all models of a list: what is left of it is over
            for work in out.glob("*.work"):
                remove_work(out / work.stem)
    elif any(out.iterdir()):
        raise OutputError(f"{out} exists, is not empty and is no sweep; choose another --out")
    write_atomically(path, text.encode())
    return len(drawn.tokens_NT)


@contextmanager
def _decided(
    sweep: _Sweep, parts: tuple[Part, ...], last: Point
) -> Iterator[dict[str, PruningResult]]:
    """Decide on all models without some parts, by name; also on those that are there already.

    So a sweep that goes on finds the work of the same passes, beside the one that is made last: the
    work beside a finished one is removed.
    """
    source, compute = sweep.opened(parts), sweep.compute
    points = [point for point in sweep.points if point.parts == parts]
    prunings = [point.settings for point in points]
    asked = [pruning_identity(settings, NOTHING_KNOWN) for settings in prunings]
    computed = runtime_identity(runtime_of(compute, source))
    identity = {"command": "sweep", "dense model": source.identity, "prunings": asked, **computed}
    with output_work_dir(sweep.out / last.name, identity, compute.memory_budget) as work_dir:
        found = decide_all(source, prunings, work_dir)
        yield {point.name: result for point, result in zip(points, found, strict=True)}


def _make(
    sweep: _Sweep, point: Point, decided: PruningResult, dense: Dense, measured: str, command: str
) -> None:
    """Prune and measure one model, in a place that is empty even after a kill."""
    own, known = sweep.opened(point.parts), Known(decided=decided)
    working, finished = sweep.out / _WORKING, sweep.out / point.name
    shutil.rmtree(working, ignore_errors=True)
    try:
        prune_checkpoint(own, working, point.settings, known=known, command=command)
        before, found = dense.result, evaluate_models([working], sweep.exam, against=dense)[-1]
        found["model"] = str(finished)
        first, second = measured_model("dense", before), measured_model("pruned", found)
        facts = {
            "perplexity": before_and_after(before["perplexity"], found["perplexity"]),
            "comparison": compare(first, second, first),
            "sweep": {
                "method": point.method,
                "sparsity": point.settings.budget.sparsity,
                "measured": measured,
            },
        }
        add_to_manifest(working, facts)
        for path in working.glob("*.safetensors"):
            path.unlink()
        working.rename(finished)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _rows(sweep: _Sweep, points: Sequence[Point], dense: Row) -> list[Row]:
    """Return the rows of models, which were measured as the dense one was."""
    rows = [Row.of(point, sweep.out / point.name) for point in points]
    for row in rows:
        if row.measured != dense.measured or row.values.keys() != dense.values.keys():
            raise OutputError(
                f"{row.directory} was not measured as the dense model of its sweep was, perhaps by "
                f"another version; delete it and {_DENSE_FILE} beside it, and run the sweep again"
            )
    return rows


def _dense_row(sweep: _Sweep, found: dict[str, Any]) -> Row:
    """Return the row of the dense model, with the digest of all that it was measured by."""
    path = sweep.out / _DENSE_FILE
    asked = read_results(path)["identity"]
    with damage_as(OutputError, path, "delete it and run the sweep again"):
        # Measured is measured, whatever versions there are now.
        measured = digest_of({name: each for name, each in asked.items() if name != "version"})
        return Row(
            *("dense", None, 0.0, sweep.source.parameter_count, found["perplexity"]),
            measured=measured,
        )

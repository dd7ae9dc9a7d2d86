"""The flow of a sweep: decide on all of a list of prunings together, then make and measure each.

A sweep's directory holds `sweep.json`, and a directory for each model: what `cfsp prune` writes,
without the weights; `cfsp prune --plan` makes them again. A model whose directory is there is not
made again, so a sweep that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from cfsp.architecture.block_names import counted
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
from cfsp.pipeline import decide_all, prune_checkpoint, pruning_identity
from cfsp.planning.importance import COARSE_WINDOWS
from cfsp.progress import item_progress
from cfsp.pruning_cost import doubts, say_doubts
from cfsp.quality.answers import Questions
from cfsp.quality.compare import compare
from cfsp.quality.evaluate import Dense, Exam, evaluate_models
from cfsp.quality.perplexity import before_and_after
from cfsp.quality.results_file import measured_model
from cfsp.quality.tasks.harness import TaskRunner
from cfsp.quality.tasks.selection import TaskSelection
from cfsp.repair.result import PruningResult
from cfsp.result.facts import Conditions
from cfsp.result.manifest import add_to_manifest, read_manifest, refusing_damage
from cfsp.result.tables import Table, estimate, pareto_front
from cfsp.selection.constraint import Share
from cfsp.settings import Compute, Part
from cfsp.streaming.memory import hidden_budget
from cfsp.streaming.runtime import runtime_identity, runtime_of
from cfsp.streaming.work_dir import output_work_dir, remove_finished_work, temporary_work_dir
from cfsp.sweep.settings import Point, SweepSettings
from cfsp.text.drawing import draw_text
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import few_windows

logger = logging.getLogger(__name__)

_DENSE_FILE = "dense.json"
_WORKING = ".working"


@dataclass(frozen=True)
class Row:
    """One model of a finished sweep; the first of a table is the dense one."""

    name: str
    method: str | None  # None for the dense model, as its directory and comparison
    sparsity: float
    parameters: int
    perplexity: Mapping[str, Mapping[str, Any]]  # by text, as `cfsp eval --json` has it
    directory: str | None = None
    comparison: dict[str, Any] | None = None  # what `cfsp.quality.compare.compare` gives

    def __post_init__(self) -> None:
        # Damage of the file that they are read from shows now.
        _ = self.values, self.conditions, self.beside_dense, self.left_out

    @staticmethod
    def of(point: Point, directory: Path, dense: Checkpoint) -> Row:
        """Return what the manifest of a model says, which was made from the dense one as it is."""
        instead = f"delete {directory} and run the sweep again"
        manifest = read_manifest(directory, instead)
        if manifest is None or "sweep" not in manifest:
            raise OutputError(f"{directory} is no model of a sweep; {instead}")
        with refusing_damage(directory, instead):
            if manifest["base_model"]["fingerprint"] != dense.fingerprint:
                raise OutputError(
                    f"{directory} was made from other weights than {dense.label} has now; choose "
                    "another --out"
                )
            return Row(
                point.name,
                point.method,
                point.settings.budget.sparsity,
                int(manifest["parameters_after"]),
                {
                    text: {"value": found["after"]}
                    | {name: found[name] for name in found if name not in ("before", "after")}
                    for text, found in manifest["perplexity"].items()
                },
                str(directory),
                dict(manifest["comparison"]),
            )

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}

    @property
    def conditions(self) -> set[Conditions]:
        """Under which perplexities were measured."""
        return {Conditions.of(text, found) for text, found in self.perplexity.items()}

    @property
    def left_out(self) -> list[str]:
        """What was measured of it and cannot be compared."""
        return [] if self.comparison is None else list(self.comparison["left_out"])

    @property
    def beside_dense(self) -> dict[str, str]:
        """What a table says of how far it is from the dense model, by column."""
        line, found = {}, self.comparison
        if found is None:
            return {}
        for column, name, factor, digits in (
            ("KL", "divergence", 1, 3),
            ("top-1 agreement, %", "agreed", 100, 1),
        ):
            values = [text[name]["second"]["value"] for text in found["texts"].values()]
            line[column] = f"{factor * fmean(values):z.{digits}f}"
        if answers := found.get("answers"):
            line["KL on answers"] = estimate(answers["divergence"]["second"], 3)
            line["answers that loop, %"] = estimate(answers["loops"]["second"], 1, 100)
        if found["tasks"]:
            for column, name, side in (
                ("accuracy - dense, %", "accuracy", "difference"),
                ("dense model's answers, %", "kept", "second"),
            ):
                line[column] = estimate(found[name][side], 1, 100) if found[name] else "-"
        return line


@dataclass(frozen=True)
class _Sweep:
    """What a sweep is made of; see `run_sweep`."""

    points: Sequence[Point]
    source: Checkpoint  # as it is opened for the first point
    opened: Callable[[tuple[Part, ...]], Checkpoint]  # as `cfsp prune` opens it for a point
    out: Path
    compute: Compute
    exam: Exam

    def row_of(self, point: Point) -> Row:
        """Return the row of a model that is there."""
        return Row.of(point, self.out / point.name, self.source)


def run_sweep(settings: SweepSettings, out: Path, compute: Compute, *, command: str) -> list[Row]:
    """Make every model of a sweep that is not there yet, and return the whole table."""
    exam, points = Exam(settings.evaluation, compute), settings.points(compute)
    if settings.tasks:
        data = None if settings.task_data is None else given_path(settings.task_data)
        selection = TaskSelection(tuple(settings.tasks), settings.limit, data=data)
        exam = replace(exam, tasks=TaskRunner.of(selection))
    if settings.answers is not None:
        exam = replace(exam, questions=Questions.of(settings.answers))
    opened = cache(lambda parts: open_checkpoint(settings.model, parts=parts))
    sweep = _Sweep(points, opened(points[0].parts), opened, out, compute, exam)
    check_is_outside(out, sweep.source.directory)
    with created_parents(out), exclusive(out), _kept(sweep):
        _claim(out, settings)
        for point in points:
            remove_finished_work(out / point.name)
        missing = [point for point in points if not (out / point.name).is_dir()]
        _ = [sweep.row_of(point) for point in points if point not in missing]  # told before work
        windows = _check(sweep) if missing else 0
        budget = hidden_budget(compute.memory_budget)
        with temporary_work_dir(budget // (4 * (len(settings.eval) + 1))) as passes:
            dense = Dense(sweep.source, {}, passes)
            (found,) = evaluate_models((), exam, against=dense, out=out / _DENSE_FILE)
            dense = replace(dense, result=found)
            say_doubts(
                doubt
                for point in missing
                for doubt in doubts(sweep.opened(point.parts), point.settings, windows)
            )
            with item_progress("sweep", len(missing), "model") as bar:
                for parts in dict.fromkeys(point.parts for point in missing):
                    with _decided(sweep, parts) as decided:
                        for point in (each for each in missing if each.parts == parts):
                            _make(sweep, point, decided[point.name], dense, command)
                            bar.update()
        return _rows(sweep, found)


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


def _claim(out: Path, settings: SweepSettings) -> None:
    """Write down what the directory is for; refuse one that is for something else.

    The lists may change: each model is made and measured as if it were alone.
    """
    path, text = out / SWEEP_FILE, json.dumps(vars(settings), indent=2) + "\n"
    remove_abandoned(path)
    if path.is_file():
        now = json.loads(text)
        with damage_as(OutputError, path, "choose another --out"):
            before = dict(json.loads(path.read_text(encoding="utf-8")))
        if {**before, **{name: now[name] for name in ("sparsity", "methods")}} != now:
            raise OutputError(
                f"{out} holds a sweep by other settings ({path}); choose another --out, or repeat "
                "that command to go on with it"
            )
    elif any(out.iterdir()):
        raise OutputError(f"{out} exists, is not empty and is no sweep; choose another --out")
    write_atomically(path, text.encode())


def _check(sweep: _Sweep) -> int:
    """Check all that is not checked when the dense model is measured, before that.

    Returns the number of windows to calibrate on.
    """
    source, text = sweep.source, sweep.points[0].settings.text
    for point in sweep.points:
        own = sweep.opened(point.parts)
        Share(own, point.settings.budget).check()
    drawn = draw_text(text, load_tokenizer(source.directory))
    # Blocks and attention layers are chosen from a few of them.
    expected = {drawn.digest, few_windows(drawn, COARSE_WINDOWS).digest}
    for directory in (sweep.out / point.name for point in sweep.points):
        manifest = read_manifest(directory) if directory.is_dir() else None
        with refusing_damage(directory):
            read = [manifest["calibration"], manifest["repair"].get("text", {})] if manifest else []
            digests = {each["tokens_digest"] for each in read if each}
        if not digests <= expected:
            raise OutputError(
                f"{directory} was made by another text than there is now; delete it and run the "
                "sweep again"
            )
    return len(drawn.tokens_NT)


@contextmanager
def _decided(sweep: _Sweep, parts: tuple[Part, ...]) -> Iterator[dict[str, PruningResult]]:
    """Decide on all models without some parts, by name; also on those that are there already.

    So a sweep that goes on finds the work of the same passes.
    """
    source, compute = sweep.opened(parts), sweep.compute
    points = [point for point in sweep.points if point.parts == parts]
    prunings = [point.settings for point in points]
    asked = [pruning_identity(settings, NOTHING_KNOWN) for settings in prunings]
    computed = runtime_identity(runtime_of(compute, source))
    identity = {"command": "sweep", "dense model": source.identity, "prunings": asked, **computed}
    last = sweep.out / points[-1].name
    with output_work_dir(last, identity, compute.memory_budget) as work_dir:
        found = decide_all(source, prunings, work_dir)
        yield {point.name: result for point, result in zip(points, found, strict=True)}


def _make(sweep: _Sweep, point: Point, decided: PruningResult, dense: Dense, command: str) -> None:
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
            "sweep": {"method": point.method, "sparsity": point.settings.budget.sparsity},
        }
        add_to_manifest(working, facts)
        for path in working.glob("*.safetensors"):
            path.unlink()
        working.rename(finished)
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _rows(sweep: _Sweep, dense: dict[str, Any]) -> list[Row]:
    """Return the rows of all models, the dense one first; all were measured as that was."""
    rows = [sweep.row_of(point) for point in sweep.points]
    with damage_as(OutputError, sweep.out / _DENSE_FILE, "delete it and run the sweep again"):
        first = Row("dense", None, 0.0, sweep.source.parameter_count, dense["perplexity"])
    for row in rows:
        if row.conditions != first.conditions:
            raise OutputError(
                f"{row.directory} was not measured as the dense model of its sweep was, perhaps by "
                f"another version; delete it and {_DENSE_FILE} beside it, and run the sweep again"
            )
    return [first, *rows]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Return the tables of a sweep."""
    return [_qualities(rows), _comparisons(rows)]


def loss_rise(after: Mapping[str, float], before: Mapping[str, float]) -> float:
    """Return by how many nats a token the loss rises between perplexities, in the texts' mean."""
    return fmean(math.log(after[text] / before[text]) for text in before)


def write_tables(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write table.md and, with a line for each model, table.json."""
    texts = {
        "table.md": "\n".join(table.to_markdown() for table in tables(rows)),
        "table.json": json.dumps([asdict(row) for row in rows], indent=2) + "\n",
    }
    for name, text in texts.items():
        write_atomically(directory / name, text.encode())
    return [directory / name for name in texts]


def _qualities(rows: Sequence[Row]) -> Table:
    dense = rows[0]
    fronts = [
        pareto_front([(row.parameters, row.values[text]) for row in rows]) for text in dense.values
    ]
    lines = [
        {
            **_names(row),
            "parameters removed": f"{1 - row.parameters / dense.parameters:.1%}",
            **{text: f"{row.values[text]:z,.2f}" for text in dense.values},
            "loss rise": f"{loss_rise(row.values, dense.values):z,.2f}",
            "Pareto front": " ".join(str(i + 1) for i, best in enumerate(fronts) if best[number])
            or "-",
        }
        for number, row in enumerate(rows)
    ]
    counts = {
        f"{counted(found['windows'], 'windows')} of {found['seqlen']} tokens"
        + (", each after BOS" if found["bos"] else "")
        for found in dense.perplexity.values()
    }
    caption = (
        f"Perplexity on {' or '.join(sorted(counts))} of each text; loss rise in nats a token, "
        "mean of the texts; Pareto front: texts, by number, on which nothing smaller is as good."
    )
    return Table(list(lines[0]), [list(line.values()) for line in lines], caption)


def _comparisons(rows: Sequence[Row]) -> Table:
    """Return a line for each model: how far it is from the dense one."""
    pruned = rows[1:]
    lines = [_names(row) | row.beside_dense for row in pruned]
    caption = (
        "Compared with the dense model in pairs: KL per token in nats and top-1 agreement in the "
        "mean of the texts."
    )
    if any("±" in cell for cell in lines[0].values()):
        caption += " Answers and tasks have standard errors."
    if (pruned[0].comparison or {})["tasks"]:
        caption += " Tasks: the mean of those on which the dense model is better than a guess."
    if left_out := pruned[0].left_out:
        caption += f" Left out: {', '.join(left_out)}."
    return Table(list(lines[0]), [list(line.values()) for line in lines], caption)


def _names(row: Row) -> dict[str, str]:
    return {"method": row.method or row.name, "sparsity": f"{100 * row.sparsity:.4g}%"}

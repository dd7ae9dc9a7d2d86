"""The flow of a sweep: calibrate once a seed -> many plans -> each pruned, measured, compared.

A sweep's directory holds `recipe.toml`, the statistics of each seed, and a directory for each
model: what `cfsp prune` writes, without the weights unless they are to be kept. A model whose
directory is there is not made again, so a sweep that was interrupted goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
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
from cfsp.checkpoint.reading import Checkpoint, parameter_count
from cfsp.engine.workplace import output_workplace, remove_finished_work
from cfsp.errors import CfspError, OutputError
from cfsp.pipeline import calibrate_source, prune_checkpoint
from cfsp.planning.allocation import channels_to_keep
from cfsp.planning.coarse import SENSITIVITY_METRICS
from cfsp.planning.make import model_size
from cfsp.progress import item_progress
from cfsp.quality.evaluate import evaluate_models
from cfsp.result.manifest import STATISTICS_FILE, add_to_manifest, read_manifest
from cfsp.settings import Compute, EvaluationText
from cfsp.sweep.recipe import Point, Recipe
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import consecutive_windows
from cfsp.whole_model.own_text import OWN_TEXT

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.toml"
_DENSE_FILE = "dense.json"
_WORKING = ".working"

# By text: {"value", "tokens", "windows", "seqlen", "stride", "bos"}, as `cfsp eval --json` has it.
Perplexities = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One model of a finished sweep; the first of a table is the dense one.

    Attributes:
        name: what it is called.
        method: name of how it was pruned; None for the dense model.
        sparsity: fraction that was asked for.
        seed: of its calibration; None for the dense model.
        parameters: of the model.
        perplexity: by text, with its conditions.
        speed: phase -> ratio to the dense model; empty if it was not timed.
        directory: what `cfsp report` reads; None for the dense model.
    """

    name: str
    method: str | None
    sparsity: float
    seed: int | None
    parameters: int
    perplexity: Perplexities
    speed: dict[str, float]
    directory: str | None

    @property
    def values(self) -> dict[str, float]:
        """Perplexity by text."""
        return {text: float(found["value"]) for text, found in self.perplexity.items()}


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
    source = open_checkpoint(recipe.model)
    check_is_outside(out, source.directory)
    with created_parents(out), exclusive(out), _kept(out, recipe):
        _claim(out, recipe)
        missing = [p for p in recipe.points if not _is_finished(out / p.name, keep_weights)]
        if missing:
            _check(recipe, source, compute)
        dense = _dense(recipe, source, out, compute)
        if missing:
            with item_progress("sweep", len(missing), "model") as bar:
                for point in missing:
                    _make(recipe, point, source, out, compute, dense, keep_weights, command)
                    bar.update()
        rows = [dense, *(_row(point, out / point.name) for point in recipe.points)]
        _check_conditions(rows, out)
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


def _check(recipe: Recipe, source: Checkpoint, compute: Compute) -> None:
    """Check all that the recipe names before the first forward pass.

    Raises:
        CfspError: a text is missing or too short, no plan meets a budget, or there is no such
            device.
    """
    compute.engine(source)
    size, tokenizer = model_size(source), load_tokenizer(source.directory)
    for point in recipe.points:
        channels_to_keep(recipe.settings(point, compute).budget, size)
    for name in recipe.eval:
        consecutive_windows(name, tokenizer, count=recipe.eval_windows, seqlen=recipe.seqlen)
    text = recipe.text(recipe.seed[0])
    others = tuple(name for name in text.names if name != OWN_TEXT)
    if others == text.names:
        text.draw(tokenizer)
    elif others:  # what the model is to write is not there yet
        replace(text, names=others).draw(tokenizer)


def _dense(recipe: Recipe, source: Checkpoint, out: Path, compute: Compute) -> Row:
    path, dtype = out / _DENSE_FILE, str(compute.engine(source).dtype).removeprefix("torch.")
    if not path.is_file():
        perplexity = _perplexities(source.directory, recipe.evaluation, compute)
        facts = {"perplexity": perplexity, "dtype": dtype}
        write_atomically(path, json.dumps(facts, indent=2).encode())
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["dtype"] != dtype:
        raise OutputError(
            f"{out} holds a sweep that computes in {found['dtype']}, this one computes in {dtype}; "
            f"give --dtype {found['dtype']} or another --out"
        )
    speed = {"prefill": 1.0, "decode": 1.0} if recipe.speed else {}
    return Row("dense", None, 0.0, None, parameter_count(source), found["perplexity"], speed, None)


def _perplexities(model: Path, texts: EvaluationText, compute: Compute) -> Perplexities:
    measured = evaluate_models([model], texts, compute)[0]
    tokens = measured["tokens"]
    return {
        text: {
            "value": value,
            "tokens": tokens[text],
            "windows": tokens[text] // (texts.seqlen - 1),
            "seqlen": texts.seqlen,
            "stride": None,
            "bos": False,
        }
        for text, value in measured["perplexity"].items()
    }


def _statistics_files(out: Path) -> list[Path]:
    return list(out.glob("statistics-seed*.safetensors"))


def _statistics(
    recipe: Recipe, seed: int, source: Checkpoint, out: Path, compute: Compute
) -> Statistics:
    path = out / f"statistics-seed{seed}.safetensors"
    remove_finished_work(path)
    if not path.is_file():
        tokenizer, text = load_tokenizer(source.directory), recipe.text(seed)
        sensitivity = any(m.block_metric in SENSITIVITY_METRICS for m in recipe.methods)
        with output_workplace(path, {"command": "sweep"}, compute.memory_budget) as place:
            calibrate_source(source, tokenizer, text, compute, place, sensitivity=sensitivity).save(
                path
            )
    return Statistics.load(path)


def _make(
    recipe: Recipe,
    point: Point,
    source: Checkpoint,
    out: Path,
    compute: Compute,
    dense: Row,
    keep_weights: bool,
    command: str,
) -> None:
    """Prune and measure one model."""
    statistics = _statistics(recipe, point.seed, source, out, compute)
    with _working_directory(out) as working:
        settings = recipe.settings(point, compute)
        prune_checkpoint(source, working, settings, statistics=statistics, command=command)
        after = _perplexities(working, recipe.evaluation, compute)
        before = dense.values
        facts: dict[str, Any] = {
            "perplexity": {text: _compared(before[text], after[text]) for text in recipe.eval},
            "sweep": {
                "method": point.method.name,
                "sparsity": point.sparsity,
                "seed": point.seed,
            },
        }
        if recipe.speed:
            facts["speed"] = _speed(source.directory, working)
        add_to_manifest(working, facts)
        if not keep_weights:
            for path in _weights(working):
                path.unlink()
        shutil.rmtree(out / point.name, ignore_errors=True)  # one that kept no weights
        working.rename(out / point.name)


def _compared(before: float, after: dict[str, Any]) -> dict[str, Any]:
    """Return an entry of the manifest's `perplexity`."""
    conditions = {name: value for name, value in after.items() if name != "value"}
    return {"before": before, "after": after["value"], **conditions}


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
    """Time both in turns: what disturbs the machine disturbs both."""
    from cfsp.speed import Conditions, Workload, compare_speed
    from cfsp.speed.subjects import Subject

    subjects = [Subject(dense, "dense"), Subject(pruned, "pruned")]
    return compare_speed(subjects, [Workload(prompt=128)], Conditions(rounds=5)).to_json()


def _weights(directory: Path) -> list[Path]:
    return [path for path in directory.glob("*.safetensors") if path.name != STATISTICS_FILE]


def _is_finished(directory: Path, keep_weights: bool) -> bool:
    return directory.is_dir() and (not keep_weights or bool(_weights(directory)))


def _row(point: Point, directory: Path) -> Row:
    manifest = read_manifest(directory)
    if manifest is None or "sweep" not in manifest:
        raise OutputError(f"{directory} is no model of a sweep; delete it and run the sweep again")
    speed: dict[str, float] = {}
    if "speed" in manifest:
        workload = manifest["speed"]["models"][1]["workloads"][0]
        speed = {phase: workload[phase]["ratio"] for phase in ("prefill", "decode")}
    perplexity = {
        text: {"value": found["after"]}
        | {name: found[name] for name in found if name not in ("before", "after")}
        for text, found in manifest["perplexity"].items()
    }
    parameters = int(manifest["parameters_after"])
    return Row(
        point.name,
        point.method.name,
        point.sparsity,
        point.seed,
        parameters,
        perplexity,
        speed,
        str(directory),
    )


def _check_conditions(rows: list[Row], out: Path) -> None:
    """Check that all models were measured alike.

    Raises:
        OutputError: one was not.
    """

    def conditions(row: Row) -> Perplexities:
        return {text: {**found, "value": None} for text, found in row.perplexity.items()}

    for row in rows:
        if conditions(row) != conditions(rows[0]):
            raise OutputError(
                f"{out / row.name} was not measured as the dense model of its sweep was, perhaps "
                "by another version; delete it and run the sweep again"
            )

"""Outputs that exist, lie in the input, or cannot be written; manifests, recipes and reports."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bad_inputs.catalogue import (
    CALIBRATE,
    EVAL,
    PRUNE,
    PRUNE_TEXT,
    RECOVER,
    TEXT,
    BadInput,
    Place,
    Table,
    assert_refused,
    edit_json,
    everything_in,
)

# What to do.
DIRECTORY, OUTPUT = "choose another output directory", "choose another output"
FILE = "choose another file"
SMALL = "--sparsity 0.4 --multiple 4"
INSIDE: Table = {
    "prune into the model": BadInput(
        f"prune {{model}} --out {{model}}/new/out {SMALL} {TEXT}",
        "{model}/new/out lies inside the source {model}",
        OUTPUT,
    ),
    "calibrate into the model": BadInput(
        f"calibrate {{model}} --out {{model}}/config.safetensors {TEXT}",
        "lies inside the source {model}",
        OUTPUT,
    ),
    "plan into the model": BadInput(
        f"plan {{model}} --statistics {{statistics}} --out {{model}}/plan.json {SMALL}",
        "{model}/plan.json lies inside the source",
        OUTPUT,
    ),
    "recover into the model": BadInput(
        "recover {pruned} --data {text} --steps 1 --seqlen 32 --out {pruned}/out",
        "{pruned}/out lies inside the source",
        OUTPUT,
    ),
    "export into the model": BadInput(
        "export {model} --to gguf --out {model}/out.gguf",
        "{model}/out.gguf lies inside the source",
        OUTPUT,
    ),
    "sweep into the model": BadInput(
        f"sweep {{model}} --sparsity 0.4 --eval {{text}} --out {{model}}/sweep {TEXT}",
        "{model}/sweep lies inside the source",
        OUTPUT,
    ),
}

EXISTING: Table = {
    "prune over another model": BadInput(
        f"prune {{model}} --out {{pruned}} {SMALL} {TEXT}",
        "{pruned} exists and is not empty",
        DIRECTORY,
    ),
    "plan over the config of the model": BadInput(
        f"plan {{model}} --statistics {{statistics}} --out {{model}}/config.json {SMALL}",
        "{model}/config.json exists already",
        FILE,
    ),
    "calibrate over a file": BadInput(
        f"calibrate {{model}} --out {{text}} {TEXT}", "{text} exists already", FILE
    ),
    "export over a file": BadInput(
        "export {model} --to gguf --out {inputs}/a.gguf",
        "{inputs}/a.gguf exists already",
        FILE,
        lambda place: (place.inputs / "a.gguf").write_text("mine"),
    ),
    "recover over another model": BadInput(
        "recover {pruned} --data {text} --steps 1 --out {model}",
        "{model} exists and is not empty",
        DIRECTORY,
    ),
    "sweep over another model": BadInput(
        f"sweep {{pruned}} --sparsity 0.4 --eval {{text}} --out {{model}} {TEXT}",
        "{model} exists, is not empty and is no sweep",
        "choose another --out",
    ),
    "prune onto a file": BadInput(
        f"prune {{model}} --out {{text}} {SMALL} {TEXT}", "{text} exists and is a file", DIRECTORY
    ),
    "prune below a file": BadInput(
        f"prune {{model}} --out {{text}}/out {SMALL} {TEXT}", "cannot write to {text}", DIRECTORY
    ),
    "demo over another model": BadInput(
        "demo --out {model}", "{model} exists and is not empty", DIRECTORY
    ),
    "report over a model's config": BadInput(
        "report {pruned} --out {pruned}/config.json", "expected a name like report.html", "web page"
    ),
}


def manifest(text: str) -> Callable[[Place], object]:
    return lambda place: (place.pruned / "cfsp.json").write_text(text)


RUNS: Table = {
    "verify without half of the manifest": BadInput(
        "verify {pruned}",
        "cfsp.json is damaged",
        "prune again",
        lambda place: edit_json(place.pruned / "cfsp.json", lambda f: f.pop("parameters_after")),
        prints=True,
    ),
    "verify with files that are a list": BadInput(
        "verify {pruned}",
        "cfsp.json is damaged",
        "prune again",
        lambda place: edit_json(place.pruned / "cfsp.json", lambda f: f.update(files=[1])),
        prints=True,
    ),
    "inspect with half a manifest": BadInput(
        "inspect {pruned}",
        "{pruned}/cfsp.json is damaged",
        "prune the model again",
        lambda place: edit_json(place.pruned / "cfsp.json", lambda f: f.update(criterion=[])),
    ),
    "manifest of another version": BadInput(
        "inspect {pruned}",
        "{pruned}/cfsp.json has manifest version 8, expected 2",
        "use the version of cfsp that wrote it",
        lambda place: edit_json(place.pruned / "cfsp.json", lambda f: f.update(manifest_version=8)),
    ),
    "manifest nested too deeply": BadInput(
        "report {pruned}",
        "{pruned}/cfsp.json is damaged",
        "prune the model again",
        manifest('{"a":' * 100_000),
    ),
    "report of what is no run": BadInput(
        "report {model}", "{model} has no cfsp.json", "a report needs a directory that cfsp prune"
    ),
    "pushing what has no weights": BadInput(
        "push {text} me/smaller", "{text} has no weights to upload", "expected a directory that"
    ),
    "comparing what is no result": BadInput(
        "compare {text}", "cannot read {text}", "make it with: cfsp eval"
    ),
    "results into a file that is something else": BadInput(
        f"{EVAL} --out {{text}}", "holds something else", "choose another --out"
    ),
    "report with results that are none": BadInput(
        "report {pruned} --results {text}", "cannot read {text}", "make it with: cfsp eval"
    ),
    "report with the plan of another run": BadInput(
        "report {pruned}",
        "speak of different models",
        "they are of different runs",
        lambda place: shutil.copyfile(place.other_plan, place.pruned / "cfsp_plan.json"),
    ),
    "recipe with an unknown key": BadInput(
        "sweep --recipe {inputs}/r.toml --out {out}",
        "{inputs}/r.toml has unknown keys: colour",
        "known are: model",
        lambda place: (place.inputs / "r.toml").write_text('model = "m"\ncolour = 1'),
    ),
    "recipe nested too deeply": BadInput(
        "sweep --recipe {inputs}/r.toml --out {out}",
        "cannot read the recipe {inputs}/r.toml",
        "recipe",
        lambda place: (place.inputs / "r.toml").write_text("a = " + "[" * 100_000),
    ),
}

CASES: Table = {**INSIDE, **EXISTING, **RUNS}


@pytest.mark.parametrize("name", CASES)
def test_refused(refused: Callable[[BadInput], None], name: str) -> None:
    refused(CASES[name])


# Disks.

WRITERS = {
    "eval": f"{EVAL} --out {{out}}.json",
    "prune": PRUNE_TEXT,
    "calibrate": CALIBRATE,
    "plan": f"plan {{model}} --statistics {{statistics}} --out {{out}} {SMALL}",
    "recover": RECOVER,
    "export": "export {model} --to vllm --out {out}",
    "sweep": f"sweep {{model}} --sparsity 0.4 --eval {{text}} --out {{out}} {TEXT}",
    "report": "report {pruned} --out {out}.html",
}  # fmt: skip

# Else the work may be kept for the same command to go on from, which the message then says.
NOT_SAVING = ("cfsp.streaming.pass_state.SHARE_OF_TIME", 0)


@contextmanager
def mounted(directory: Path, options: str) -> Iterator[None]:
    """Mount a small file system of its own; skip where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system lets not even root mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("command", WRITERS)
def test_a_read_only_disk(command: str, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    case = BadInput(WRITERS[command], "cannot write", "choose another")
    with mounted(place.work, "ro,size=1m"):
        assert_refused(case, place, capfd)


@pytest.mark.parametrize("command", ["prune", "calibrate", "export"])
def test_a_full_disk(
    command: str,
    place: Place,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(*NOT_SAVING)
    case = BadInput(WRITERS[command], "No space left on device", OUTPUT)
    with mounted(place.work, "size=8k"):
        assert_refused(case, place, capfd)


def test_a_limit_on_the_size_of_files(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    """What a quota does; needs no root."""
    case = BadInput(WRITERS["export"], "File too large", OUTPUT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    _ = place.model
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        assert_refused(case, place, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_directories_for_an_output_go_when_nothing_comes_of_it(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    case = BadInput(
        PRUNE.replace("{out}", "{out}/deep/er") + " --data {inputs}/absent.txt",
        "absent.txt",
        "known are",
    )
    assert_refused(case, place, capfd)


def test_a_sweep_that_a_mistake_ended_may_be_corrected(place: Place) -> None:
    from cfsp.cli import main

    argv = ["sweep", place.model, "--sparsity", 0.4, "--multiple", 4, "--out", place.out,
            "--windows", 1, "--seqlen", 32, "--samples", 4, "--data", place.text]  # fmt: skip
    words = [str(word) for word in argv]
    assert main([*words, "--eval", str(place.inputs / "absent.txt")]) == 2
    assert everything_in(place.work) == []
    assert main([*words, "--eval", str(place.text)]) == 0
    assert json.loads((place.out / "cfsp-0.4" / "cfsp.json").read_text())["sweep"]


def test_the_catalogue_covers_every_command() -> None:
    from bad_inputs import test_arguments, test_decisions, test_texts, test_weights
    from cfsp.cli import build_parser

    tables = (
        CASES,
        test_arguments.CASES,
        test_decisions.CASES,
        test_texts.CASES,
        test_weights.CASES,
    )
    cases = [case for table in tables for case in table.values()]
    assert len(cases) >= 60
    commands = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert {case.command.split()[0] for case in cases} == set(commands) - {"cache"}  # type: ignore[arg-type]

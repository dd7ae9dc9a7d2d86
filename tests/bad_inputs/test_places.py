"""Outputs that exist, lie in the input, or cannot be written; manifests and reports."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import cfsp
from bad_inputs import test_arguments as arguments
from bad_inputs import test_decisions as decisions
from bad_inputs import test_texts as texts
from bad_inputs import test_weights as weights
from bad_inputs.catalogue import (
    CALIBRATE,
    EVAL,
    PRUNE_TEXT,
    RECOVER,
    TEXT,
    BadInput,
    Spoil,
    assert_refused,
    everything_in,
    refusals,
    spoilt,
)
from builders import edit_json, raising, read_json
from cfsp.checkpoint.locating import given_path
from cfsp.checkpoint.output import check_output_is_free, write_atomically
from cfsp.checkpoint.own_files import check_links
from cfsp.cli import COMMANDS, main
from cfsp.errors import CheckpointError, OutputError, TextError, UsageError
from cfsp.streaming.work_dir import temporary_work_dir
from cfsp.text.sources import TextSource, check_texts

SMALL = "--sparsity 0.4 --multiple 4"
SWEEP = f"sweep {{model}} --sparsity 0.4 --eval {{text}} {TEXT} --out"
PLAN = f"prune {{model}} --statistics {{statistics}} {SMALL} --dry-run --out"
INTO = f"prune {{model}} {SMALL} {TEXT} --out"
TRAIN = "recover {pruned} --data {text} --steps 1 --seqlen 32 --out"
OUTPUT, DIRECTORY = "choose another output", "choose another output directory"

# Commands that end with --out, and an output below what they read.
INSIDE = [
    BadInput(f"{command} {out}", f"{out} lies inside the source", OUTPUT)
    for command, out in (
        (INTO, "{model}/new/out"),
        (f"calibrate {{model}} {TEXT} --out", "{model}/config.safetensors"),
        (TRAIN, "{pruned}/out"),
        ("export {model} --to gguf --out", "{model}/out.gguf"),
        (SWEEP, "{model}/sweep"),
        (f"{EVAL} --out", "{model}/results.json"),
    )
]

EXISTING = [
    BadInput(f"{command} {out}", f"{out} {says}", cure)
    for command, out, says, cure in (
        (INTO, "{pruned}", "exists and is not empty", DIRECTORY),
        (f"calibrate {{model}} {TEXT} --out", "{text}", "exists already", "choose another file"),
        ("export {model} --to vllm --out", "{pruned}", "exists and is not empty", DIRECTORY),
        (TRAIN, "{model}", "exists and is not empty", DIRECTORY),
        (SWEEP, "{pruned}", "exists, is not empty and is no sweep", "choose another --out"),
        (SWEEP, "{text}", "exists and is a file", DIRECTORY),
        (SWEEP, "/", "exists, is not empty and is no sweep", "choose another --out"),
        (INTO, "{text}", "exists and is a file", DIRECTORY),
        (INTO, ".", "is the current directory", DIRECTORY),
        (INTO.replace("--out", "--effort best --out"), ".", "is the current directory", DIRECTORY),
        ("demo --out", "{model}", "exists and is not empty", DIRECTORY),
    )
]
EXISTING += [
    BadInput(
        f"{INTO} {{inputs}}/link",
        "{inputs}/link is a link",
        "choose the output directory",
        lambda place: (place.inputs / "link").symlink_to(place.work),
    ),
    BadInput(
        f"{SWEEP} {{inputs}}/link",
        "{inputs}/link is a link to no directory",
        DIRECTORY,
        lambda place: (place.inputs / "link").symlink_to("nowhere"),
    ),
    BadInput(f"{INTO} {999 * 'x'}", "File name too long", "give another path"),
    *(
        BadInput(f"{command} {245 * 'x'}", "File name too long", "give another path")
        for command in (INTO, f"{EVAL} --out")
    ),
    BadInput(f"{INTO} {{text}}/out", "cannot write to {text}", DIRECTORY),
    BadInput("report {pruned} --out {pruned}/config.json", "expected a name like report", "page"),
    # The directories above an output go as well.
    BadInput(
        f"prune {{model}} {SMALL} --out {{out}}/deep/er --data {{inputs}}/no.txt",
        "no.txt is neither",
        "known are",
    ),
    BadInput(f"{EVAL} --out {{text}}", "holds something else", "choose another --out"),
    BadInput(f"{EVAL} --out {{pruned}}", "{pruned} is a directory", "choose a file for --out"),
]


def manifest(change: Callable[[dict[str, Any]], object]) -> Spoil:
    return lambda place: edit_json(place.pruned / "cfsp.json", change)


RUNS = [
    *spoilt(
        "verify {pruned}",
        "prune the model again",
        ("cfsp.json is damaged", manifest(lambda f: f.pop("files"))),
        ("cfsp.json is damaged", manifest(lambda f: f.update(files=[1]))),
    ),
    *spoilt(
        f"{INTO.replace('{model}', '{pruned}')} {{out}}",
        "prune the model again",
        ("{pruned}/cfsp.json is damaged", manifest(lambda f: f.update(base_model=1))),
    ),
    *spoilt(
        "inspect {pruned}",
        "",
        (
            "{pruned}/cfsp.json has manifest version 8, expected 2; use the version of cfsp that",
            manifest(lambda f: f.update(manifest_version=8)),
        ),
        (
            "{pruned}/cfsp.json is damaged",
            lambda place: (place.pruned / "cfsp.json").write_text('{"a":' * 100_000),
        ),
        ("{pruned}/cfsp.json is damaged", manifest(lambda f: f.update(criterion=[]))),
    ),
    BadInput("report {model}", "{model} has no cfsp.json", "needs a directory that cfsp prune"),
    BadInput("compare {pruned}", "it is a directory, expected a file", "--out {pruned}.json"),
    BadInput("compare {text}", "cannot read {text}", "make it with: cfsp eval"),
    BadInput("report {pruned} {text}", "cannot read {text}", "make it with: cfsp eval"),
    BadInput("report {pruned} " + 999 * "x", "File name too long", "give another path"),
    BadInput("report {text}", "beside {text}, found none", "expected the directory of a run"),
    BadInput(
        "report {pruned}",
        "is not the plan that cfsp.json tells of",
        "they are of different runs",
        lambda place: shutil.copyfile(place.other_plan, place.pruned / "cfsp_plan.json"),
    ),
]

CASES = INSIDE + EXISTING + RUNS

test_refused = refusals(CASES)


# Disks.

WRITERS = {
    "eval": f"{EVAL} --out {{out}}.json",
    "prune": PRUNE_TEXT,
    "calibrate": CALIBRATE,
    "plan": f"{PLAN} {{out}}",
    "recover": RECOVER,
    "export": "export {model} --to vllm --out {out}",
    "sweep": f"{SWEEP} {{out}}",
    "report": "report {pruned} --out {out}.html",
}


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
def test_a_read_only_disk(command, place, capfd):
    case = BadInput(WRITERS[command], "cannot write", "choose another")
    with mounted(place.work, "ro,size=1m"):
        assert_refused(case, place, capfd)


@pytest.mark.parametrize("command", ["prune", "calibrate", "export"])
def test_a_full_disk(command, place, capfd, monkeypatch):
    # Else the work may be kept for the same command to go on from, which the message then says.
    monkeypatch.setattr("cfsp.streaming.block_pass.SHARE_OF_TIME", 0)
    case = BadInput(WRITERS[command], "No space left on device", OUTPUT)
    with mounted(place.work, "size=8k"):
        assert_refused(case, place, capfd)


def test_a_limit_on_the_size_of_files(place, capfd):
    """What a quota does; needs no root."""
    case = BadInput(WRITERS["export"], "File too large", OUTPUT)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    _ = place.model
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        assert_refused(case, place, capfd)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_place_for_temporary_files(monkeypatch):
    """As where all disks are full: Python tries to write to each."""
    error = FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/']")
    monkeypatch.setattr("tempfile.gettempdir", raising(error))
    said = "no directory for temporary files can be written to; make room there, or set TMPDIR"
    with pytest.raises(OutputError, match=said), temporary_work_dir():
        pass


def test_a_path_that_the_system_cannot_look_up(place, monkeypatch, command):
    for out in ("a\0b", "a\ud800b", "a\udcdfb"):
        with pytest.raises(UsageError, match=r"cannot look up a.*; give another path"):
            cfsp.prune(place.model, sparsity=0.4, out=out)
    # Names that are no UTF-8 come so from the system; records of a run are.
    with pytest.raises(CheckpointError, match=r"the name 'a\\udcdfb' is no UTF-8"):
        cfsp.prune("a\udcdfb", sparsity=0.4, out=place.out)
    for text in ("a\udcdfb.txt", lambda: cfsp.Text("a\udcdfb", "text")):
        with pytest.raises(TextError, match=r"a\\udcdfb.*half of a surrogate pair"):
            check_texts([text if isinstance(text, str) else text()])
    gone = place.work / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match=r"cannot look up out: No such file .*; give another path"):
        cfsp.prune(place.model, sparsity=0.4, out="out")
    # Only a path from there is lost with it, but not every library works without one.
    place.out.mkdir()
    check_output_is_free(place.out)
    assert "the current directory is not there" in command("inspect", place.model, status=2).err


def test_a_place_without_a_name_or_with_a_long_one_is_not_written(place):
    for out in ("/", ".", 245 * "x"):
        with pytest.raises(OutputError, match=rf"cannot write {out}: .*; make room there"):
            write_atomically(out, b"")
    assert everything_in(place.work) == []


def test_a_path_below_a_directory_that_may_not_be_entered(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    inner.mkdir()
    inner.chmod(0o777)
    monkeypatch.chdir(inner)
    user = os.geteuid()
    tmp_path.chmod(0)
    try:
        if user == 0:
            os.seteuid(65534)
        assert given_path("results.json") == Path("results.json")
        check_output_is_free(Path("out"))
        write_atomically("deep/results.json", b"")
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)


def test_what_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    inner = tmp_path / "inner"
    (inner / "closed").mkdir(parents=True)
    (inner / "model").mkdir()
    for name in ("model/LICENSE", "a.parquet"):
        (inner / name).write_text("words")
        (inner / name).chmod(0)
    (inner / "listed" / "additional_chat_templates").mkdir(parents=True)
    (inner / "templates" / "additional_chat_templates").mkdir(parents=True)
    (inner / "templates" / "additional_chat_templates").chmod(0)
    (inner / "listed").chmod(0o644)  # what is in it can be listed, and nothing else
    (inner / "closed").chmod(0)
    inner.chmod(0o777)
    monkeypatch.chdir(inner)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        unreadable = ("closed", "listed", "model/LICENSE", "templates/additional_chat_templates")
        for path in unreadable:
            with pytest.raises(CheckpointError, match=f"cannot read {path}: permission denied;"):
                check_links(Path(path.partition("/")[0]))
        with pytest.raises(OutputError, match="cannot write closed: Permission denied;"):
            check_output_is_free(Path("closed"))
        for name, message in (
            ("closed/x.txt", "is neither a file nor a known text"),
            ("a.parquet", "a.parquet is not a readable parquet file: .*Permission denied"),
        ):
            with pytest.raises(TextError, match=message):
                next(TextSource(name, "calibration").documents())
    finally:
        os.seteuid(user)
        for path in (inner / "closed", inner / "listed", *inner.glob("templates/*")):
            path.chmod(0o700)


def test_a_sweep_that_a_mistake_ended_may_be_corrected(place):
    argv = ["sweep", place.model, "--sparsity", 0.4, "--multiple", 4, "--out", place.out,
            "--windows", 1, "--seqlen", 32, "--samples", 4, "--data", place.text]  # fmt: skip
    words = [str(word) for word in argv]
    no_data = ["--tasks", "piqa", "--task-data", str(place.inputs)]
    for wrong in (
        ["--eval", str(place.inputs / "absent.txt")],
        ["--eval", str(place.text), *no_data],
    ):
        assert main([*words, *wrong]) == 2
        assert everything_in(place.work) == []
    assert main([*words, "--eval", str(place.text)]) == 0
    assert read_json(place.out / "cfsp-0.4" / "cfsp.json")["sweep"]


def test_the_catalogue_covers_every_command():
    tables = (CASES, *(each.CASES for each in (arguments, decisions, texts, weights)))
    cases = [case for table in tables for case in table]
    assert len(cases) > 130  # as docs/TRUST.md says
    assert {case.command.split()[0] for case in cases} == set(COMMANDS)

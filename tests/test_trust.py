"""What docs/TRUST.md promises besides the catalogue of bad input in tests/bad_inputs."""

import errno
import gc
import os
import random
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLock
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import cfsp
from builders import entries, raising
from cfsp.checkpoint import output
from cfsp.checkpoint.locating import open_checkpoint
from cfsp.checkpoint.output import exclusive, staged_directory, staged_file
from cfsp.checkpoint.own_files import PLAN_FILE, STATISTICS_FILE
from cfsp.cli import main
from cfsp.decide import plan_from
from cfsp.errors import ChangedFileError, OutputError
from cfsp.result.card import Origin, model_card
from cfsp.result.manifest import read_manifest
from cfsp.settings import Budget, PruneSettings
from commands import Command
from conftest import REPOSITORY
from mutation import changed_document
from report_runs import measured
from targets import TARGETS, read_once

# Any bytes.


@pytest.mark.parametrize("name", ["checkpoint", "statistics", "plan", "gguf"])
@given(st.data())
def test_any_bytes_are_read_or_an_error(name, data):
    """Any, or a valid file with a piece replaced or some of its fields changed."""
    whole = data.draw(st.sampled_from(TARGETS[name].seeds()))
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, min(len(whole), begin + 40)))
    kinds = [st.binary(max_size=300), st.just(whole[:begin] + data.draw(st.binary()) + whole[end:])]
    changed = changed_document(whole, random.Random(begin))
    if changed is not None:
        again = changed_document(changed, random.Random(end))
        kinds += [st.just(changed), st.just(again or changed)]
    read_once(TARGETS[name], data.draw(st.one_of(kinds)))


# What is quoted.


def test_a_message_is_one_printable_line():
    error = OutputError("no tensor named\na\x1b[2Jb\ud800 \N{RIGHT-TO-LEFT OVERRIDE}c, größer")
    assert str(error) == r"no tensor named\na\x1b[2Jb\ud800 \u202ec, größer"


def test_a_card_quotes_foreign_text_as_code(run):
    hostile = "x`\n---\n# <script>alert(1)</script> | [a](javascript:1)"
    origin = Origin(hostile, metadata={"license": hostile, "tags": [hostile]})
    manifest = read_manifest(run)
    manifest |= {"base_model": {"name": hostile}, "perplexity": measured(hostile, 1, 2)}
    card = ModelCard(model_card(manifest, cfsp.PruningPlan.load(run / PLAN_FILE), origin))
    assert card.data.license == hostile
    outside_code = re.sub(r"^ {4}.*$", "", re.sub(r"`[^`\n]*`", "", card.text), flags=re.M)
    for foreign in ("<script>", "[a]", "# <", "---\n#"):
        assert foreign not in outside_code
    (row,) = [line for line in card.text.splitlines() if line.startswith("| `")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 5  # four cells


# Two runs, one output.


def check_keeps_others_out(directory: Path, said: str) -> None:
    with exclusive(directory):
        with pytest.raises(OutputError, match=said), exclusive(directory):
            pass
        assert directory.is_dir()


def test_one_run_at_a_time_in_a_directory(tmp_path):
    check_keeps_others_out(tmp_path / "place", "working in .*place; wait for it, or choose another")
    with exclusive(tmp_path / "place"):
        pass
    assert not (tmp_path / "place").exists()


def test_a_directory_that_ends_with_the_run_before_is_made_again(tmp_path, monkeypatch):
    """It goes while the lock is held, perhaps after another run has made sure that it is there."""
    acquired, place = output._acquired, tmp_path / "a" / "place"

    def acquired_late(lock_file: Path, patience: float) -> Any:
        place.rmdir()
        place.parent.rmdir()
        return acquired(lock_file, patience)

    monkeypatch.setattr(output, "_acquired", acquired_late)
    with exclusive(place):
        assert place.is_dir()


def test_a_lock_that_a_killed_run_left_may_be_removed(tmp_path, monkeypatch):
    """Where the file system has no locks, as of some clusters, it is a file that says whose."""
    monkeypatch.setattr("cfsp.checkpoint.output.FileLock", SoftFileLock)
    left = tmp_path / ".place.lock"
    left.write_text("10828\nanother-node\n")
    said = f"wait for it, remove {left} if it was killed on another machine, or choose another"
    with pytest.raises(OutputError, match=said), exclusive(tmp_path / "place"):
        pass
    left.unlink()
    with exclusive(tmp_path / "place"):
        pass
    assert entries(tmp_path) == set()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_the_file_system_has_no_locks_a_file_is_one(number, tmp_path, monkeypatch):
    """As on NFS without a daemon of locks."""
    monkeypatch.setattr("fcntl.flock", raising(OSError(number, os.strerror(number))))
    check_keeps_others_out(tmp_path / "place", "another run is working in .*place; wait for it")
    assert entries(tmp_path) == set()


def test_the_first_of_two_outputs_stays(tmp_path):
    with (
        pytest.raises(OutputError, match="exists and is not empty; choose another"),
        staged_directory(tmp_path / "out") as staging,
    ):
        (staging / "file").write_text("second")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("first")
    assert (tmp_path / "out" / "file").read_text() == "first"
    with (
        pytest.raises(OutputError, match=r"another run has written .*meanwhile"),
        staged_file(tmp_path / "one") as staged,
    ):
        staged.write_text("second")
        (tmp_path / "one").write_text("first")
    assert (tmp_path / "one").read_text() == "first"
    assert entries(tmp_path) == {"out", "one"}


def test_a_source_that_is_gone_is_not_said_to_be_the_output(model, tmp_path, monkeypatch):
    """As where someone removes it during a run."""
    gone = "could be read before and now cannot: "
    source, out = tmp_path / "file", tmp_path / "out"
    with (
        pytest.raises(ChangedFileError, match=f"file {gone}No such file"),
        staged_directory(out) as staging,
    ):
        shutil.copyfile(source, staging / "file")
    with pytest.raises(OutputError, match=r"cannot write .*out"), staged_directory(out) as staging:
        staging.rmdir()
    assert entries(tmp_path) == set()
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", raising(OSError("no such file\nat")))
    with pytest.raises(ChangedFileError, match=f"{model} {gone}OSError: no such file;"):
        cfsp.load(model)


def test_a_sweep_where_another_one_works_is_refused(model, text_file, tmp_path, command):
    argv = ["sweep", model, "--sparsity", 0.4, "--data", text_file, "--eval", text_file]
    with exclusive(tmp_path / "out"):
        error = command(*argv, "--out", tmp_path / "out", status=2).err
        assert "another run is working in" in error


@pytest.mark.parametrize("command", ["prune", "calibrate"])  # a directory, and a file
def test_of_two_processes_one_wins(command, commands, model, text_file, tmp_path):
    out, drawn = tmp_path / "out", ["--data", str(text_file), "--seqlen", "32"]
    options = {
        "prune": ["--sparsity", "0.4", "--multiple", "4", "--samples", "8"],
        "calibrate": ["--samples", "8"],
    }
    argv = [command, str(model), *drawn, *options[command], "--out", str(out)]
    first, second = sorted(commands(Command(argv), Command(argv)), key=lambda it: it.status)
    assert (first.status, second.status) == (0, 2), (first.stderr, second.stderr)
    message = second.stderr.splitlines()[-1]
    assert "another run is working in" in message or f"{out} exists" in message
    assert "Traceback" not in second.stderr
    assert entries(tmp_path) == {"out"}
    if command != "calibrate":
        assert main(["inspect", str(out)]) == 0


# Long life.


def resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if not statm.is_file():
        pytest.skip("no /proc here")
    return int(statm.read_text().split()[1]) * resource.getpagesize()


def test_many_prunes_do_not_grow_memory(model, few, tmp_path):
    for number in range(5):
        if number == 2:
            before = resident_bytes()
        cfsp.prune(model, out=tmp_path / str(number), sparsity=0.4, multiple=4, **few)
    assert resident_bytes() - before < 20 << 20


def test_many_plans_leave_nothing_behind(model, pruned, caplog):
    source = open_checkpoint(model)
    caplog.set_level("ERROR", "cfsp")  # what was said is kept for the report of a test that fails
    for number in range(60):
        if number == 20:
            gc.collect()
            before = len(gc.get_objects())
        budget = Budget(0.1 + 0.01 * number, multiple=4)
        plan_from(source, cfsp.Statistics.load(pruned / STATISTICS_FILE), PruneSettings(budget))
    gc.collect()
    assert len(gc.get_objects()) - before < 40  # an object of each


# The document.


def test_every_test_named_in_the_document_exists():
    text = (REPOSITORY / "docs" / "TRUST.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:\w+/)?test_\w+\.py(?:::\w+)?)`", text)
    assert len(named) > 15
    for name in named:
        file, _, function = name.partition("::")
        path = REPOSITORY / "tests" / file
        assert path.is_file(), name
        if function:
            assert f"def {function}(" in path.read_text(encoding="utf-8"), name

"""A killed run goes on where it was and gives the same bits; other work is refused."""

import json
import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from builders import edit_json, entries, read_json, stop
from cfsp.cli import main
from cfsp.errors import OutputError, ResumeError
from cfsp.processes import Team
from cfsp.streaming.block_pass import _Saver
from cfsp.streaming.block_stream import StreamedBlock
from cfsp.streaming.work_dir import PassState, output_work_dir, read_state
from tiny_models import BLOCKS, build_tiny_model


@pytest.fixture(scope="module")
def text(text_file):
    return ["--data", str(text_file), "--samples", "9", "--seqlen", "32", "--batch-windows", "2"]


def argv_of(model: Path, text: list[str], out: Path) -> dict[str, list[str]]:
    half = ["--sparsity", "0.5", "--multiple", "4"]
    return {
        "calibrate": ["calibrate", str(model), *text, "--out", str(out / "stats")],
        "prune": ["prune", str(model), *text, *half, "--out", str(out / "out")],
    }


@pytest.fixture
def runs(commands, command, model, text, tmp_path):
    """Commands that calibrate or prune a model into a directory; some are killed."""
    return SimpleNamespace(
        kill=commands.kill,
        end=lambda argv: command(*argv).err,
        refused=lambda argv: command(*argv, status=2).err,
        directory=tmp_path,
        **argv_of(model, text, tmp_path),
    )


@pytest.fixture(scope="module")
def whole(model, text, tmp_path_factory) -> dict[str, bytes]:
    """What runs without interruption write."""
    directory = tmp_path_factory.mktemp("whole")
    for argv in argv_of(model, text, directory).values():
        assert main(argv) == 0
    files = {"stats": (directory / "stats").read_bytes()}
    for name in ("model.safetensors", "cfsp_plan.json", "cfsp.statistics"):
        files[name] = (directory / "out" / name).read_bytes()
    assert entries(directory) == {"stats", "out"}
    return files


def test_calibration_killed_at_a_block_resumes_there(runs, whole):
    """In a file, after memory, after a file."""
    argv = [*runs.calibrate, "--memory-budget", "1KB"]
    runs.kill(argv, "after", 1)
    runs.kill(runs.calibrate, "within", 2)
    assert entries(runs.directory) == {"stats.work"}
    message = runs.end(argv)
    assert f"going on at block 2 of {BLOCKS}" in message
    assert "exceed the memory budget of 1e-06 GB; they go to a file" in message
    assert (runs.directory / "stats").read_bytes() == whole["stats"]
    assert entries(runs.directory) == {"stats"}  # no file of hidden states either


@pytest.mark.parametrize(
    ("where", "block", "pass_name", "done"),
    [
        ("within", 2, "coarse pass", 1),
        ("within", BLOCKS + 3, "ridge", 2),
        ("writing", 0, "ridge", BLOCKS),
    ],
)
def test_pruning_killed_at_a_block_resumes_there(runs, where, block, pass_name, done, whole):
    runs.kill(runs.prune, where, block)
    assert "out" not in entries(runs.directory)
    message = runs.end(runs.prune)
    if pass_name != "coarse pass":
        assert f"coarse pass: going on at block {BLOCKS} of {BLOCKS}" in message
    assert f"{pass_name}: going on at block {done} of {BLOCKS}" in message
    for name in set(whole) - {"stats"}:
        assert (runs.directory / "out" / name).read_bytes() == whole[name], name
    assert entries(runs.directory) == {"out"}


# What is refused.


def test_another_command_is_refused_and_the_same_goes_on_in_another_directory(
    runs, model, whole, monkeypatch
):
    """What was given now may be wrong where the run that was killed was right."""
    runs.kill(runs.prune, "within", BLOCKS + 2)
    work_dir = runs.directory / "out.work"
    before = entries(work_dir / "process-0")
    for change, key in (
        (["--sparsity", "0.4"], "--sparsity (0.5; now it is 0.4); repeat"),
        (["--repair", "none"], "--repair (ridge; now it is none); repeat"),
        (["--multiple", "8"], "--multiple (4; now it is 8); repeat"),
    ):
        message = runs.refused([*runs.prune, *change]).splitlines()[-1]
        assert f"holds unfinished work that differs in {key}" in message
        assert f"rm -r {work_dir}" in message
        assert "out" not in entries(runs.directory)
        assert entries(work_dir / "process-0") == before
    for change, said in (
        (["--samples", "1"], "repair needs at least 2 windows"),
        (["--seqlen", "4096"], "9 are needed"),
    ):
        refused = runs.refused([*runs.prune, *change])
        assert said in refused and "; the command that began it goes on from it" in refused
    # The model's weights count there, and not what it is called from there.
    monkeypatch.chdir(model.parent)
    argv = [model.name if word == str(model) else word for word in runs.prune]
    assert "ridge: going on at block 1" in runs.end(argv)
    assert (runs.directory / "out/model.safetensors").read_bytes() == whole["model.safetensors"]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"new name": 1, "version": {"cfsp-llm": "0.2"}}, r"differs in version \(.*0\.1.*0\.2"),
        (
            {"new name": 1, "version": {"cfsp-llm": "0.1"}},
            r"differs in new name \(None; now it is 1\)",
        ),
    ],
    ids=["a release", "a state of the repository"],
)
def test_work_of_another_version_is_what_that_version_finishes(now, said, tmp_path):
    """The command that began it may be the very same."""
    began = {"old name": 1, "version": {"cfsp-llm": "0.1"}}
    with pytest.raises(KeyboardInterrupt), output_work_dir(tmp_path / "out", began, None) as work:
        PassState(work.directory / "ridge", began).commit(1)
        raise KeyboardInterrupt
    said += ".*; go back to the version that began it to finish it, or start over with"
    with pytest.raises(ResumeError, match=said), output_work_dir(tmp_path / "out", now, None):
        pass


def test_a_number_is_told_and_a_digest_is_not(tmp_path):
    for was, now, said in (
        (1 / 3, 0.3, " (0.3333333333333333; now it is 0.3)"),
        ("0f" * 32, "a", ""),
    ):
        PassState(tmp_path / "out.work/process-0/a pass", {"text": was}).commit(1)
        with pytest.raises(ResumeError, match=re.escape(f"differs in text{said}; repeat")):
            PassState(tmp_path / "out.work/process-0/a pass", {"text": now})
        shutil.rmtree(tmp_path / "out.work")


def test_weights_that_are_touched_cost_no_work(runs, model, copied):
    """The same bytes: the same command goes on."""
    argv = [str(copied) if word == str(model) else word for word in runs.calibrate]
    original, weights = StreamedBlock.advance, copied / "model.safetensors"

    def touched(block: StreamedBlock, *args: Any) -> None:
        if block.index == 1:
            weights.touch()
        original(block, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cfsp.streaming.block_pass.SHARE_OF_TIME", float("inf"))
        patch.setattr(StreamedBlock, "advance", touched)
        assert "was changed while it was read; start again" in runs.refused(argv)
    assert "going on at block" in runs.end(argv)


def test_another_text_model_or_dtype_is_refused(runs, model, copied):
    argv = [str(copied) if word == str(model) else word for word in runs.calibrate]
    runs.kill(argv, "after", 1)
    for change, key in (
        (["--seed", "5"], "calibration text; repeat"),
        (["--dtype", "bfloat16"], "dtype (float32; now it is bfloat16)"),
        (["--batch-windows", "3"], "batch of windows (2; now it is 3)"),
    ):
        assert f"differs in {key}" in runs.refused([*argv, *change])
    config = (copied / "config.json").read_text()
    edit_json(copied / "config.json", lambda fields: fields.update(rms_norm_eps=0.25))
    assert "differs in model; repeat" in runs.refused(argv)
    (copied / "config.json").write_text(config)
    changed = build_tiny_model("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    changed.save_pretrained(copied)
    assert "differs in model; repeat" in runs.refused(argv)


def test_other_statistics_of_the_same_text_are_refused(runs):
    """What they kept is repaired already, and other channels would be cut."""
    first, second = (str(runs.directory / name) for name in ("first", "second"))
    for statistics, metric in ((first, "angular"), (second, "auto")):
        asked = ["--block-metric", metric, "--out", statistics]
        assert main([*runs.calibrate[:-2], *asked]) == 0
    argv = [*runs.prune, "--statistics"]
    runs.kill([*argv, first], "within", 2)
    assert "differs in --statistics; repeat" in runs.refused([*argv, second])
    assert "ridge: going on at block 1" in runs.end([*argv, first])


@pytest.mark.parametrize(
    ("name", "asked", "the_pass", "key"),
    [
        ("prune", ["--target-speedup", "1.2"], "cfsp.decide.calibrate", "dense model"),
        ("calibrate", ["--parts", "blocks"], "cfsp.pipeline.calibrate", "model"),
    ],
    ids=["times", "what fits into memory"],
)
def test_what_was_found_of_another_model_or_dtype_is_refused(
    runs, model, tiny_checkpoint, name, asked, the_pass, key, monkeypatch
):
    """It is found before any pass, which would know what it is of."""
    found = {"curves": {"ffn": [[8, 0.3], [96, 1.0]]}, "conditions": {"disturbance": 0.0}}
    monkeypatch.setattr("cfsp.selection.speedup.measure_latencies", lambda *_: found)
    given = [word for word in getattr(runs, name) if word not in (str(model), "--sparsity", "0.5")]
    argv = [*given, *asked]
    with monkeypatch.context() as patch:
        patch.setattr(the_pass, stop)
        assert main([*argv, str(model)]) == 130
    assert f"differs in {key}; repeat" in runs.refused([*argv, str(tiny_checkpoint("mistral"))])
    assert "differs in dtype (float32; now it is bfloat16); repeat" in runs.refused(
        [*argv, "--dtype", "bfloat16", str(model)]
    )


def test_a_state_is_complete_and_a_damaged_one_is_refused(runs):
    runs.kill(runs.calibrate, "after", 2)
    (state,) = runs.directory.rglob("state.json")
    # Everything that it speaks of is on disk.
    fields = read_json(state)
    assert fields["next_block"] == 2
    hidden = state.parent / "hidden-00002.bin"
    assert hidden.stat().st_size == 9 * 32 * 32 * 4
    assert len(list(state.parent.glob("statistics-*.safetensors"))) == 2
    statistics = min(state.parent.glob("statistics-*.safetensors"))
    for part, wrong in (
        (statistics, "is not complete"),
        (hidden, "is gone or damaged"),
    ):
        whole = part.read_bytes()
        for damaged in (whole[:9], None):
            part.unlink() if damaged is None else part.write_bytes(damaged)
            assert f"{wrong}; start over with: rm -r" in runs.refused(runs.calibrate)
        part.write_bytes(whole)
        assert state.is_file()
    statistics.write_bytes(whole)
    said = f"is damaged; start over with: rm -r {runs.directory / 'stats.work'}"
    for damaged in ("{}", json.dumps({**fields, "identity": 1})):
        state.write_text(damaged)
        assert said in runs.refused(runs.calibrate)


def test_runs_of_other_numbers_of_processes_share_no_place(tmp_path):
    with output_work_dir(tmp_path / "out", {}, None, Team(0, 1)):
        with (
            pytest.raises(OutputError, match=r"another run is working in .*out\.work"),
            output_work_dir(tmp_path / "out", {}, None, Team(0, 2)),
        ):
            pass
        with output_work_dir(tmp_path / "out", {}, None, Team(1, 2)):
            pass
    assert not entries(tmp_path)


# What stays and what goes.


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_keeps_its_work_and_says_so(error, runs, whole, monkeypatch, capsys):
    original = StreamedBlock.advance

    def interrupted(block: StreamedBlock, *args: Any) -> None:
        if block.index == 1:
            raise error
        original(block, *args)

    with monkeypatch.context() as patch:
        patch.setattr("cfsp.streaming.block_pass.SHARE_OF_TIME", float("inf"))
        patch.setattr(StreamedBlock, "advance", interrupted)
        if error is KeyboardInterrupt:
            assert main(runs.calibrate) == 130
        else:
            with pytest.raises(OSError):
                main(runs.calibrate)
    kept = f"the work so far is kept in {runs.directory / 'stats.work'}; the same command goes on"
    assert kept in capsys.readouterr().err
    runs.end(runs.calibrate)
    assert (runs.directory / "stats").read_bytes() == whole["stats"]


def test_leftovers_that_nothing_resumes_from_and_work_beside_a_finished_output_go(runs, whole):
    """A kill can come between the output and the removal of what it was made from."""
    directory = runs.directory / "stats.work" / "process-0" / "calibrate"
    directory.mkdir(parents=True)
    (directory / "hidden-00001.bin").write_bytes(b"half")
    of_two = runs.directory / "stats.work" / "process-1" / "calibrate"
    shutil.copytree(directory, of_two)
    for argv, name in ((runs.calibrate, "stats"), (runs.prune, "out")):
        runs.end(argv)
        state = runs.directory / f"{name}.work" / "process-0" / "calibrate" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
        assert f"{runs.directory / name} exists" in runs.refused(argv)
    assert entries(runs.directory) == {"stats", "out"}
    assert (runs.directory / "stats").read_bytes() == whole["stats"]


# How often to save.


def test_saving_takes_a_small_share_of_the_time(monkeypatch):
    now, saves = 0.0, 0

    def save(*_: Any) -> None:
        nonlocal now, saves
        now, saves = now + 4.0, saves + 1

    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(_Saver, "_save", save)
    nothing: Any = None
    saver, hidden = _Saver(*4 * [nothing], Team()), SimpleNamespace(nbytes=3_000_000_000)
    while now < 20_000:  # it is expected to take 10 s, and takes less
        saver.block_done(hidden)
        now += 7.0  # a block
    assert 4.0 * saves / now <= 0.02
    assert saves > 80


def test_the_advice_to_start_over_removes_nothing_else(tmp_path):
    (tmp_path / "my").mkdir()
    state = tmp_path / "my out.work" / "process-0" / "ridge" / "state.json"
    with pytest.raises(ResumeError) as refused:
        read_state(state, {})
    assert shlex.split(str(refused.value))[-3:] == ["rm", "-r", str(tmp_path / "my out.work")]

"""A killed run goes on where it was and gives the same bits; other work is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cfsp.cli import main
from cfsp.streaming.pass_state import Pace
from commands import Commands
from tiny_models import BLOCKS, build_tiny_model

Files = dict[str, bytes]


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint("llama")


@pytest.fixture(scope="module")
def text(text_file: Path) -> list[str]:
    return ["--data", str(text_file), "--samples", "9", "--seqlen", "32", "--batch-windows", "2"]


@pytest.fixture
def calibrate(model: Path, text: list[str], tmp_path: Path) -> list[str]:
    return ["calibrate", str(model), *text, "--out", str(tmp_path / "stats")]


@pytest.fixture
def prune(model: Path, text: list[str], tmp_path: Path) -> list[str]:
    return ["prune", str(model), *text, "--sparsity", "0.5", "--multiple", "4",
            "--out", str(tmp_path / "out")]  # fmt: skip


@pytest.fixture(scope="module")
def whole(model: Path, text: list[str], tmp_path_factory: pytest.TempPathFactory) -> Files:
    """What runs without interruption write."""
    directory = tmp_path_factory.mktemp("whole")
    assert main(["calibrate", str(model), *text, "--out", str(directory / "stats")]) == 0
    argv = ["prune", str(model), *text, "--sparsity", "0.5", "--multiple", "4"]
    assert main([*argv, "--out", str(directory / "out")]) == 0
    files = {"stats": (directory / "stats").read_bytes()}
    for name in ("model.safetensors", "cfsp_plan.json", "cfsp.statistics"):
        files[name] = (directory / "out" / name).read_bytes()
    assert names(directory) == {"stats", "out"}
    return files


@pytest.mark.parametrize(
    ("where", "block", "budget"),
    [("within", 0, []), ("after", 0, ["--memory-budget", "1KB"]), ("within", 2, [])],
    ids=["start", "file", "memory"],
)
def test_calibration_killed_at_a_block_resumes_there(
    commands: Commands,
    where: str,
    block: int,
    budget: list[str],
    calibrate: list[str],
    whole: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands.kill([*calibrate, *budget], where, block + 1)
    assert names(tmp_path) == {"stats.work"}
    assert main([*calibrate, *budget]) == 0
    done = block + (where == "after")
    message = capsys.readouterr().err
    assert (f"going on at block {done} of {BLOCKS}" in message) == (done > 0)
    assert (tmp_path / "stats").read_bytes() == whole["stats"]
    assert names(tmp_path) == {"stats"}


def test_it_may_be_killed_again_and_resume_with_another_budget(
    commands: Commands, calibrate: list[str], whole: Files, tmp_path: Path
) -> None:
    commands.kill(calibrate, "after", 1)
    commands.kill([*calibrate, "--memory-budget", "1KB"], "within", 2)
    assert main(calibrate) == 0
    assert (tmp_path / "stats").read_bytes() == whole["stats"]


@pytest.mark.parametrize(
    ("where", "block", "pass_name", "done"),
    [
        ("within", 2, "coarse pass", 1),
        ("within", BLOCKS + 1, "ridge", 0),
        ("within", BLOCKS + 3, "ridge", 2),
        ("writing", 0, "ridge", BLOCKS),
    ],
)
def test_pruning_killed_at_a_block_resumes_there(
    commands: Commands,
    where: str,
    block: int,
    pass_name: str,
    done: int,
    prune: list[str],
    whole: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands.kill(prune, where, block)
    assert "out" not in names(tmp_path)
    assert main(prune) == 0
    message = capsys.readouterr().err
    if pass_name != "coarse pass":
        assert f"coarse pass: going on at block {BLOCKS} of {BLOCKS}" in message
    if done:
        assert f"{pass_name}: going on at block {done} of {BLOCKS}" in message
    for name in set(whole) - {"stats"}:
        assert (tmp_path / "out" / name).read_bytes() == whole[name], name
    assert names(tmp_path) == {"out"}


# What is refused.


def test_another_command_is_refused(
    commands: Commands, prune: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.kill(prune, "within", BLOCKS + 2)
    before = names(tmp_path / "out.work" / "process-0-of-1")
    for change, key in (
        (["--sparsity", "0.4"], "sparsity"),
        (["--repair", "none"], "--repair"),
        (["--channel-metric", "wanda"], "channel_metric"),
    ):
        assert main([*prune, *change]) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert f"holds unfinished work with another {key}" in message
        assert f"rm -r {tmp_path / 'out.work'}" in message
        assert "out" not in names(tmp_path)
        assert names(tmp_path / "out.work" / "process-0-of-1") == before
    shutil.rmtree(tmp_path / "out.work")
    assert main([*prune, *change]) == 0


def test_another_text_model_or_dtype_is_refused(
    commands: Commands,
    calibrate: list[str],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    argv = [str(copy) if word == str(model) else word for word in calibrate]
    commands.kill(argv, "after", 1)
    for change, key in (
        (["--seed", "5"], "calibration text"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--batch-windows", "3"], "batch of windows"),
    ):
        assert main([*argv, *change]) == 2
        assert f"with another {key} (" in capsys.readouterr().err
    changed = build_tiny_model("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    changed.save_pretrained(copy)
    assert main(argv) == 2
    assert "with another model fingerprint (" in capsys.readouterr().err


def test_damaged_state_is_refused(
    commands: Commands, calibrate: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.kill(calibrate, "after", 1)
    (state,) = tmp_path.rglob("state.json")
    state.write_text("{}")
    assert main(calibrate) == 2
    assert (
        f"is damaged; start over with: rm -r {tmp_path / 'stats.work'}" in capsys.readouterr().err
    )


def test_two_runs_do_not_share_a_place(
    calibrate: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fcntl = pytest.importorskip("fcntl")
    directory = tmp_path / "stats.work" / "process-0-of-1"
    directory.mkdir(parents=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(calibrate) == 2
    assert "another run is working in" in capsys.readouterr().err
    assert main(calibrate) == 0


# What stays and what goes.


def test_leftovers_that_nothing_resumes_from_go(
    calibrate: list[str], whole: Files, tmp_path: Path
) -> None:
    directory = tmp_path / "stats.work" / "process-0-of-1" / "calibrate"
    directory.mkdir(parents=True)
    (directory / "hidden-0.bin").write_bytes(b"half")
    assert main(calibrate) == 0
    assert (tmp_path / "stats").read_bytes() == whole["stats"]
    assert names(tmp_path) == {"stats"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_keeps_its_work_and_says_so(
    stop: type[BaseException],
    calibrate: list[str],
    whole: Files,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cfsp.streaming.block_stream import StreamedBlock

    original = StreamedBlock.advance

    def interrupted(block: StreamedBlock, *args: object) -> None:
        if block.index == 1:
            raise stop
        original(block, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("cfsp.streaming.pass_state.SHARE_OF_TIME", float("inf"))
        patch.setattr(StreamedBlock, "advance", interrupted)
        if stop is KeyboardInterrupt:
            assert main(calibrate) == 130
        else:
            with pytest.raises(OSError):
                main(calibrate)
    kept = f"the work so far is kept in {tmp_path / 'stats.work'}; the same command goes on"
    assert kept in capsys.readouterr().err
    assert main(calibrate) == 0
    assert (tmp_path / "stats").read_bytes() == whole["stats"]


def test_a_state_is_complete_or_not_there(
    commands: Commands, calibrate: list[str], tmp_path: Path
) -> None:
    """Everything that the state speaks of is on disk before it is."""
    commands.kill(calibrate, "after", 2)
    (state,) = tmp_path.rglob("state.json")
    fields = json.loads(state.read_text())
    assert fields["next_block"] == 2
    assert (state.parent / fields["hidden"]).stat().st_size == 9 * 32 * 32 * 4
    assert len(list(state.parent.glob("statistics-*.safetensors"))) == 2


def test_work_beside_a_finished_output_goes(
    calibrate: list[str],
    prune: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A kill can come between the output and the removal of what it was made from."""
    for argv, name in ((calibrate, "stats"), (prune, "out")):
        assert main(argv) == 0
        state = tmp_path / f"{name}.work" / "process-0-of-1" / "calibrate" / "state.json"
        state.parent.mkdir(parents=True)
        state.write_text("{}")
        assert main(argv) == 2
        assert f"{tmp_path / name} exists" in capsys.readouterr().err
    assert names(tmp_path) == {"stats", "out"}


def test_a_sweep_that_was_killed_while_it_wrote_its_recipe_begins(
    model: Path, text: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    abandoned = out / f".recipe.toml.partial-{2**22 + 1}"  # no process has this number
    abandoned.write_text("model =")
    argv = ["sweep", str(model), *text[:6], "--sparsity", "0.4", "--multiple", "4"]
    assert main([*argv, "--eval", text[1], "--eval-windows", "1", "--out", str(out)]) == 0
    assert not abandoned.exists()
    assert names(out / "cfsp-0.4") >= {"cfsp.json", "config.json"}
    assert not list(out.rglob("model*.safetensors"))


# How often to save.


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now, spent = 0.0, 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    pace = Pace(nbytes=3_000_000_000)  # expected to take 10 s
    saves = 0
    while now < 20_000:
        now += 7.0  # a block
        if pace.due():
            saves += 1
            now += 4.0  # it takes less
            spent += 4.0
            pace.saved(4.0)
    assert spent / now <= 0.02
    assert saves > 80

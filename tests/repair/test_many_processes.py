"""Several processes prune together: what one gives, and no half result if one dies."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders import entries, read_json
from cfsp.checkpoint.own_files import MANIFEST_FILE, PLAN_FILE
from cfsp.cli import main
from cfsp.selection import speedup
from cfsp.streaming.work_dir import PassState
from commands import Command, ranks
from forks import Finished
from tiny_models import BLOCKS

ASKED = ["--sparsity", "0.4", "--multiple", "8", "--dtype", "float32"]


@pytest.fixture(scope="module")
def argv_of(tiny_checkpoint, text_file) -> Callable[..., list[str]]:
    text = ["--data", str(text_file), "--samples", "10", "--seqlen", "32", "--batch-windows", "2"]
    return lambda name, asked: ["prune", str(tiny_checkpoint(name)), *text, *asked]


@pytest.fixture(scope="module")
def argv(argv_of) -> list[str]:
    return argv_of("llama", ASKED)


Finish = Callable[..., list[Finished]]


@pytest.fixture
def finish(commands, tmp_path) -> Finish:
    """Run a command in several processes; check that it ends, with what one process makes."""

    def run(argv: list[str], size: int) -> list[Finished]:
        ended = commands.finish(many(argv, tmp_path), size)
        check_alike(argv, tmp_path)
        return ended

    return run


def many(argv: list[str], tmp_path: Path) -> list[str]:
    return [*argv, "--out", str(tmp_path / "many")]


def check_alike(argv: list[str], tmp_path: Path) -> None:
    """Check that `many`, which is there, is what one process makes."""
    assert entries(tmp_path) == {"many"}
    one, together = tmp_path / "one", tmp_path / "many"
    assert main([*argv, "--out", str(one)]) == 0
    assert entries(one) == entries(together)
    assert (one / PLAN_FILE).read_bytes() == (together / PLAN_FILE).read_bytes()
    assert numbers_of(one) == pytest.approx(numbers_of(together), rel=1e-5)
    expected, found = (load_file(path / "model.safetensors") for path in (one, together))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        difference = torch.linalg.vector_norm(found[name] - tensor)
        assert difference <= 1e-6 * torch.linalg.vector_norm(tensor), name


def numbers_of(pruned: Path) -> list[float]:
    """Return the perplexities in a manifest, and what each repair came to."""
    manifest = read_json(pruned / MANIFEST_FILE)
    sides = ("before", "after")
    measured = [each[side] for each in manifest["perplexity"].values() for side in sides]
    blocks = [block for step in manifest["repair"]["steps"] for block in step["blocks"] if block]
    return measured + [block[key] for block in blocks for key in ("error_before", "error_after")]


def test_two_processes_give_what_one_gives(finish, argv_of, text_file):
    argv = [*argv_of("mixtral", ASKED), "--eval", str(text_file), "--windows", "5"]
    assert [bool(each.stdout) for each in finish(argv, 2)] == [True, False]


def test_two_processes_take_the_same_parts(finish, argv_of):
    """The first chooses how many go whole; all calibrate and repair."""
    goal = ["--target-params", "0.75", "--parts", "ffn,kv,blocks"]
    finish(argv_of("llama", [*goal, *ASKED[2:]]), 2)


def test_four_processes_fit_to_the_drift_together(finish, argv_of, tmp_path):
    """The first of them has no window that is held out."""
    asked = ["--repair", "sequential", "--samples", "17", "--sparsity", "0.5", *ASKED[2:]]
    finish(argv_of("llama", asked), 4)
    _ridge, fitted = read_json(tmp_path / "many" / MANIFEST_FILE)["repair"]["steps"]
    assert any(block["kept"] for block in fitted["blocks"])


LATENCIES = {
    "curves": {"ffn": [[8, 0.6], [96, 1.0]], "blocks": [[0, 0.05], [BLOCKS, 1.0]]},
    "conditions": {"disturbance": 0.0},
}
PRUNE_WITH_LATENCIES = """
import os
import sys

import cfsp.selection.speedup as speedup
from cfsp.cli import main

def measure(*_):
    assert os.environ["RANK"] == "0", "another process would measure something else"
    return {latencies}

speedup.measure_latencies = measure
sys.exit(main({argv}))
"""


def test_the_first_process_times_for_all(forks, argv_of, tmp_path, monkeypatch):
    argv = argv_of("llama", ["--target-speedup", "1.2", "--parts", "ffn,blocks", *ASKED[2:]])
    code = PRUNE_WITH_LATENCIES.format(latencies=LATENCIES, argv=many(argv, tmp_path))
    ended = forks.code(code, *ranks(2))
    assert "1.2 times faster" in ended[0].stdout
    monkeypatch.setattr(speedup, "measure_latencies", lambda *_: LATENCIES)
    check_alike(argv, tmp_path)


def test_after_deaths_the_same_command_goes_on(
    commands, command, finish, argv, text_file, tmp_path
):
    evaluation = ["--eval", str(text_file), "--windows", "1"]
    argv, said = [*argv, "--repair", "sequential", *evaluation], []
    for dying, count in ((1, BLOCKS + 2), (0, 1)):
        ended = commands.together(many(argv, tmp_path), 2, [dying], "after", count, patience=12)
        left = 1 - dying
        assert (ended[dying].status, ended[left].status) == (-signal.SIGKILL, 2), ended
        said.append(ended[0].stderr)
        lines = ended[left].stderr.splitlines()
        (line,) = [line for line in lines if line.startswith("cfsp prune:")]
        assert f"[process {left}] process {left} of 2 lost another process, or waited for" in line
        assert not (tmp_path / "many").exists()
        error = command(*many(argv, tmp_path), status=2).err
        assert (
            "unfinished work that differs in number of processes (2; now it is 1); repeat" in error
        )
    ended = finish(argv, 2)
    assert f"ridge: going on at block 2 of {BLOCKS}" in said[1]
    assert f"sequential: going on at block 1 of {BLOCKS}" in ended[0].stderr
    assert ended[1].stderr == ""  # it would say the same


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (["--seed", "1"], "calibration text"),
        (["--dtype", "bfloat16"], "--dtype"),
        (["--batch-windows", "1"], "--batch-windows"),
        (["--eval", "mixed/books"], "evaluation text"),
    ],
)
def test_processes_with_different_work_are_refused(commands, argv, tmp_path, other, what):
    argv = [*argv, "--out", str(tmp_path / "many")]
    first, second = ranks(2)
    other = Command([*argv, *other], environment=second)
    ended = commands(Command(argv, environment=first), other)
    assert [each.status for each in ended] == [2, 2], ended
    for each in ended:
        assert f"process 1 has another {what} than process 0" in each.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("prune m --max-loss-increase 1 --out o", "--max-loss-increase runs in one process"),
        ("eval m --tasks piqa --out o", "--tasks runs in one process"),
        ("sweep m --sparsity 0.4 --eval mixed --out o", "cfsp sweep runs in one process"),
        ("bench m", "cfsp bench runs in one process"),
        ("demo", "cfsp demo runs in one process"),
    ],
)
def test_what_one_process_alone_can_do_is_refused(
    argv, said, model, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    words = [str(model) if word == "m" else word for word in argv.split()]
    assert f"{said}, found 2" in command(*words, status=2).err
    assert not list(tmp_path.iterdir())


def test_a_pass_goes_back_to_the_state_before(tmp_path):
    state = PassState(tmp_path / "place" / "process" / "pass", {})
    for block in (2, 5, 7):
        state.hidden_file(block).touch()
    state.commit(5)  # a kill came while the last was written
    read = PassState(state.directory, {})
    assert read.reachable == {0, 2, 5}
    read.remove_earlier()
    assert read.reachable == {0, 5}
    assert entries(state.directory) == {"state.json", "hidden-00005.bin"}

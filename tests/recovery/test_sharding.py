"""Recovery whose processes each hold a part of the weights: as one process that holds all."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import cfsp
from builders import entries, tensors
from cfsp.checkpoint.output import exclusive
from cfsp.result.manifest import read_manifest
from commands import Command, ranks

STEPS = 2


@pytest.fixture
def argv(pruned, text_file) -> list[str]:
    options = {"seqlen": 32, "steps": STEPS, "evaluations": 1, "learning-rate": 3e-3}
    options["batch-windows"] = 4
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["recover", str(pruned), "--data", str(text_file), *given]


def of_each(argv: list[str], out: Path, size: int) -> list[str]:
    """Return the command of each of some processes: a step has 4 windows whatever their number."""
    return [*argv, "--out", str(out), "--batch-windows", str(4 // size), "--json"]


def check_alike(one: Path, many: Path) -> None:
    """Check losses and weights."""
    expected, found = (read_manifest(path) for path in (one, many))
    assert len(found["recovery"]["history"]) > 1
    for a, b in zip(expected["recovery"]["history"], found["recovery"]["history"], strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    weights = tensors(one)
    assert weights.keys() == tensors(many).keys()
    for name, tensor in tensors(many).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def without_parts(model, few, tmp_path_factory) -> Path:
    """A model without a block, an attention, KV groups and channels."""
    place, pruned = tmp_path_factory.mktemp("without"), model
    steps: list[dict[str, Any]] = [
        {"parts": "blocks", "remove": 1},
        {"parts": "attention", "remove": 1},
        {"parts": "kv", "sparsity": 0.5},
        {"sparsity": 0.4, "multiple": 8},
    ]
    for number, asked in enumerate(steps):
        cfsp.prune(pruned, out=place / str(number), repair="none", **asked, **few)
        pruned = place / str(number)
    return pruned


@pytest.mark.parametrize(
    "options", [["--method", "lora", "--rank", "2"], ["--method", "full", "--shard"]]
)
def test_two_processes_give_what_one_gives_also_of_what_lost_other_parts(
    command, commands, argv, without_parts, model, tmp_path, options
):
    argv = ["recover", str(without_parts), *argv[2:], *options]
    argv += ["--teacher", str(model), "--teacher-weight", "0.5"]
    command(*argv, "--out", tmp_path / "one")
    ended = commands.finish(of_each(argv, tmp_path / "two", 2), 2)
    assert json.loads(ended[0].stdout)["steps"] == STEPS
    assert ended[1].stdout == ""
    check_alike(tmp_path / "one", tmp_path / "two")


def test_another_number_of_processes_goes_on(command, commands, argv, tmp_path):
    """Two begin and die, one goes on and dies, two finish."""
    argv = [*argv, "--rank", "2", "--shard", "--steps", "3", "--evaluations", "3"]
    out = tmp_path / "out"
    for size, count in ((2, 2), (1, 3)):
        of_one = of_each(argv, out, size)
        ended = commands.together(of_one, size, range(size), "training", count)
        assert [each.status for each in ended] == [-signal.SIGKILL] * size, ended
    commands.finish(of_each(argv, out, 2), 2)
    command(*argv, "--out", tmp_path / "one")
    check_alike(tmp_path / "one", out)
    assert entries(tmp_path) == {"one", "out"}


def test_experts_are_sharded(command, commands, argv, tiny_checkpoint, tmp_path):
    mixtral = str(tiny_checkpoint("mixtral"))
    argv = ["recover", mixtral, *argv[2:], "--method", "full"]
    command(*argv, "--out", tmp_path / "one")
    commands.finish(of_each([*argv, "--shard"], tmp_path / "two", 2), 2)
    check_alike(tmp_path / "one", tmp_path / "two")


MEASURING = """
import torch.distributed
from cfsp.cli import main
from cfsp.errors import UsageError
from cfsp.recovery import recover

def measured_before(*what):
    print("in a group:", torch.distributed.is_initialized())
    raise UsageError("enough")

recover.measured_before = measured_before
print(main(ARGV))
"""


def test_the_others_wait_in_the_team_for_what_the_first_measures(forks, argv, text_file, tmp_path):
    """And not for another group to open, which has an end."""
    argv += ["--rank", "2", "--eval", str(text_file), "--windows", "1", "--shard"]
    argv += ["--out", str(tmp_path / "out")]
    ended = forks.code(MEASURING.replace("ARGV", repr(argv)), *ranks(2))
    assert [each.stdout for each in ended] == ["in a group: True\n2\n", "2\n"], ended


REFUSED = """
from cfsp import processes
from cfsp.cli import main

processes._START_SECONDS = 5.0
print(main(ARGV))
"""


def test_what_the_first_refuses_all_refuse_at_once(forks, argv, tmp_path):
    """Another run is working there: the others do not wait for a first one that has gone."""
    argv += ["--out", str(tmp_path / "out")]
    with exclusive(tmp_path / "out.work" / "process-0"):
        ended = forks.code(REFUSED.replace("ARGV", repr(argv)), *ranks(2))
    for each in ended:
        assert each.stdout == "2\n" and "another run is working in" in each.stderr, each


def test_processes_with_different_teachers_are_refused(commands, argv, tmp_path):
    """As where one of them does not see the dense model that was pruned."""
    argv += ["--out", str(tmp_path / "out"), "--shard"]
    given = (argv, [*argv, "--teacher", "none"])
    both = zip(given, ranks(2), strict=True)
    for each in commands(*(Command(own, environment=rank) for own, rank in both)):
        assert each.status == 2, each
        assert "process 1 has another --teacher than process 0 (none; there" in each.stderr
    assert not list(tmp_path.iterdir())

"""Several processes calibrate together: the same bits as one, and no half result if one dies."""

import signal

import pytest
import torch
from torch.distributed import TCPStore

from builders import entries
from cfsp.errors import ProcessError, UsageError
from cfsp.processes import Team, joined, naming_lost_processes, process_rank, take_own_accelerator
from cfsp.streaming.block_stream import check_enough, part_of
from cfsp.text.windows import Windows
from commands import Command, ranks


@pytest.fixture(scope="module")
def text(text_file) -> list[str]:
    return ["--data", str(text_file), "--samples", "9", "--seqlen", "32", "--batch-windows", "2"]


# What `torchrun --standalone --nproc-per-node=2 -m` does, but that its processes are forked.
TORCHRUN = """
import sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from cfsp.__main__ import main

sys.argv = {argv}
place = {{"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}}
elastic_launch(LaunchConfig(1, 1, 2, **place, start_method="fork"), main)()
"""


def test_two_processes_of_torchrun_give_what_one_gives(forks, model, text, tmp_path, command):
    argv = ["calibrate", str(model), *text, "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    command(*argv, one)
    (finished,) = forks.code(TORCHRUN.format(argv=["cfsp", *argv, str(two), "--json"]))
    assert finished.stdout.count('"processes": 2') == 1  # the first process alone prints
    assert entries(tmp_path) == {"one", "two"}

    assert two.read_bytes() == one.read_bytes()


def test_a_process_that_torchrun_ends_leaves_no_output(commands, model, text, tmp_path):
    """Process 1 is killed, and process 0 is told to end as torchrun then tells it."""
    out = tmp_path / "out" / "stats"
    argv = ["calibrate", str(model), *text, "--out", str(out)]
    first, second = ranks(2)
    ended = commands(
        Command(argv, dies="terminated", count=2, environment=first),
        Command(argv, dies="after", count=2, environment=second),
    )
    assert [each.status for each in ended] == [128 + signal.SIGTERM, -signal.SIGKILL], ended
    assert "[process 0] terminated (torchrun does that when another" in ended[0].stderr
    assert not out.exists()


WAITING = """
import time
from datetime import timedelta
import torch
import torch.distributed
from cfsp import processes

# The first waits by the one, the others by what their group was made with.
processes.PATIENCE_SECONDS = 1
group, short = torch.distributed.new_group, timedelta(seconds=1)
torch.distributed.new_group = lambda **how: group(**{"timeout": short, **how})
with processes.joined(torch.device("cpu")) as team:
    print(team.from_first(lambda: time.sleep(2) or 7), team.gather(team.rank, at=1))
"""


def test_what_the_first_does_alone_may_take_longer_than_the_others_wait(forks):
    ended = forks.code(WAITING, *ranks(2))
    assert [each.stdout for each in ended] == ["7 []\n", "7 [0, 1]\n"], ended


TWICE = """
import time
import torch
from cfsp import processes

processes._START_SECONDS = 5
for _ in range(2):
    with processes.joined(torch.device("cpu")) as team:
        print(team.gather(team.rank))
    time.sleep(0.5 * team.is_first)  # the other looks for it meanwhile
"""


def test_a_script_calls_twice_in_the_processes_that_torchrun_started(forks):
    """Its agent keeps what they left there the first time."""
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = {"MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ended = forks.code(TWICE, *({**rank, **there} for rank in ranks(2)))
    assert [each.stdout for each in ended] == ["[0, 1]\n[0, 1]\n"] * 2, ended


def test_a_process_that_is_in_a_group_of_its_own_is_told_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(UsageError, match="before init_process_group"), joined(torch.device("cpu")):
        raise AssertionError


RUNS = """
import torch
from pathlib import Path
from cfsp.calibration.calibrate import calibrate
from cfsp.checkpoint.reading import LoadedModel
from cfsp.job import Job
from cfsp.processes import joined
from cfsp.settings import Budget, PruneSettings
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows
from tiny_models import build_tiny_model

source, cpu = LoadedModel(build_tiny_model("llama")), torch.device("cpu")
windows = Windows(torch.arange(36 * 128).view(36, 128) % 320, {"text": 36})
with joined(cpu) as team:
    work_dir, runtime = WorkDir(Path("DIRECTORY"), team=team), Runtime(cpu, torch.float32, 4)
    job = Job(source, PruneSettings(Budget()), print, print, runtime, work_dir)
    runs = calibrate(job, windows, runs=True).runs
print(runs.tokens, [round(value, 4) for row in runs.sums for value in row])
"""


def test_runs_of_blocks_are_compared_on_the_same_tokens(forks, tmp_path):
    ended = forks.code(RUNS.replace("DIRECTORY", str(tmp_path)), {}, *ranks(2))
    assert len({each.stdout for each in ended}) == 1, ended


# The parts.


def test_windows_are_split_between_batches():
    windows = Windows(torch.arange(9)[:, None].expand(9, 4), {"text": 9})

    def parts(processes: int, batch: int) -> list[list[int]]:
        of_each = [part_of(windows, Team(rank, processes), batch) for rank in range(processes)]
        return [windows.part(own).tokens_NT[:, 0].tolist() for own in of_each]

    # None has more than the first, for which the others wait as long as it takes.
    assert parts(2, 2) == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    assert parts(3, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert parts(3, 5) == [[0, 1, 2, 3, 4], [5, 6, 7, 8], []]


def test_more_processes_than_batches_are_refused():
    windows = Windows(torch.zeros(9, 4, dtype=torch.int64), {"text": 9})
    message = r"9 windows in batches of 4 are 3 batches, too few for 4 processes.*batch-windows 2"
    with pytest.raises(UsageError, match=message):
        check_enough(windows, Team(0, 4), 4)


def test_one_accelerator_for_several_processes_is_refused(monkeypatch):
    take_own_accelerator("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    take_own_accelerator("cpu")
    with pytest.raises(UsageError, match=r"cuda:1 names one accelerator for 2 processes"):
        take_own_accelerator("cuda:1")


@pytest.mark.parametrize(
    "said", ["[gloo/transport/tcp/pair.cc:553] Connection closed by peer", "[gloo] Timed out"]
)
def test_a_process_that_other_libraries_lose_is_told(said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    lost = r"process 1 of 2 lost another .*; see what that one"
    with pytest.raises(ProcessError, match=lost), naming_lost_processes():
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), naming_lost_processes():
        raise RuntimeError("shapes differ")
    assert process_rank() == 1
    monkeypatch.delenv("WORLD_SIZE")
    assert process_rank() == 0  # what is left of RANK makes it no other process
    with pytest.raises(RuntimeError, match="gloo"), naming_lost_processes():
        raise RuntimeError(said)

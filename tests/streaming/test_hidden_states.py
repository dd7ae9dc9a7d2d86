"""Hidden states in memory and in files, and how much memory there is."""

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from builders import entries, raising
from cfsp.errors import OutputError
from cfsp.streaming import memory
from cfsp.streaming.hidden_states import HiddenStates
from cfsp.streaming.work_dir import temporary_work_dir

SHAPE = (5, 7, 3)
BATCHES = [slice(0, 2), slice(2, 4), slice(4, 5)]


def values(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def write_all(hidden: HiddenStates, wanted_NTD: torch.Tensor) -> None:
    for batch in BATCHES:
        hidden.write(batch, wanted_NTD[batch])


def read_all(hidden: HiddenStates) -> torch.Tensor:
    return torch.cat([hidden.read(batch).clone() for batch in BATCHES])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_file", [False, True])
def test_what_is_written_is_read(in_file, dtype, tmp_path):
    hidden = HiddenStates(SHAPE, dtype, tmp_path if in_file else None)
    assert hidden.nbytes == 5 * 7 * 3 * dtype.itemsize
    for seed in range(3):
        write_all(hidden, values(seed, dtype))
        assert torch.equal(read_all(hidden), values(seed, dtype))
    hidden.write(BATCHES[0], values(9, dtype)[BATCHES[0]])
    assert torch.equal(hidden.read(BATCHES[0]), values(9, dtype)[BATCHES[0]])
    assert torch.equal(hidden.read([4, 2]), values(2, dtype)[[4, 2]])


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("in_file", [False, True])
def test_what_was_saved_stays(in_file, later, tmp_path):
    """Blocks that pass after a save must not touch what a killed run resumes from."""
    hidden = HiddenStates(SHAPE, torch.bfloat16, tmp_path if in_file else None)
    write_all(hidden, values(0))
    hidden.save(tmp_path / "saved")
    write_all(hidden, values(1))
    hidden.write(BATCHES[0], values(99)[BATCHES[0]])  # killed in the middle of a block
    resumed = HiddenStates(SHAPE, torch.bfloat16, tmp_path if later else None)
    resumed.load(tmp_path / "saved")
    assert torch.equal(read_all(resumed), values(0))
    assert torch.equal(hidden.read(BATCHES[1]), values(1)[BATCHES[1]])


def test_what_nobody_goes_on_from_has_no_name_that_a_kill_could_leave(tmp_path):
    with temporary_work_dir() as work_dir:
        assert not work_dir.directory.exists()
        directory = work_dir.directory_of("pass")
        assert stat.S_IMODE(work_dir.directory.stat().st_mode) == 0o700
        hidden = HiddenStates(SHAPE, torch.bfloat16, directory)
        write_all(hidden, values(0))
        assert not entries(directory)
        assert torch.equal(read_all(hidden), values(0))
    assert not work_dir.directory.exists()


def test_a_full_disk_is_an_error_and_not_a_crash(tmp_path, monkeypatch):
    full = raising(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OutputError, match=r"No space left.*--memory-budget .of prune"):
        HiddenStates(SHAPE, torch.bfloat16, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"No space left.*fewer windows"):
        HiddenStates(SHAPE, torch.bfloat16).save(tmp_path / "saved")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_hidden_states_in_a_file_take_no_memory(forks, tmp_path):
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from cfsp.streaming.hidden_states import HiddenStates\n"
        "def resident():\n"
        "    text = Path('/proc/self/status').read_text()\n"
        "    return int(text.split('VmRSS:')[1].split()[0]) * 1024\n"
        f"directory = Path({str(tmp_path)!r})\n"
        "hidden = HiddenStates((64, 1024, 1024), torch.bfloat16, directory)\n"
        "states = torch.ones(1, 1024, 1024, dtype=torch.bfloat16)\n"
        "before, highest = resident(), 0\n"
        "for _ in range(2):\n"
        "    for i in range(64):\n"
        "        batch = slice(i, i + 1)\n"
        "        hidden.read(batch).sum()\n"
        "        hidden.write(batch, states)\n"
        "        highest = max(highest, resident())\n"
        "    hidden.save(directory / 'saved')\n"
        "    hidden.load(directory / 'saved')\n"
        "    highest = max(highest, resident())\n"
        "print(highest - before)\n"
    )
    (done,) = forks.code(code)
    grown = int(done.stdout)
    assert grown < 32 << 20, f"{grown} of {64 << 21} bytes were resident"


# Memory.


PRINT_PEAK = "from cfsp.streaming.memory import peak_rss_bytes; print(peak_rss_bytes())"


def test_the_peak_stays_when_memory_is_given_back(forks):
    code = (
        "from cfsp.streaming.memory import peak_rss_bytes\n"
        "before = peak_rss_bytes()\n"
        "block = b'x' * 400_000_000\n"
        "del block\n"
        "print(peak_rss_bytes() - before)\n"
    )
    (done,) = forks.code(code)
    assert int(done.stdout) > 300_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="what a process inherits differs elsewhere")
def test_the_peak_is_not_that_of_the_program_it_was_started_from():
    # A process between, whose memory is large when it starts the one that is asked.
    program = (
        "import subprocess, sys; block = b'x' * 400_000_000; "
        f"print(subprocess.check_output([sys.executable, '-c', {PRINT_PEAK!r}], text=True))"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert 5_000_000 < int(printed) < 300_000_000


V2 = ("memory.max", "memory.current", "file", "shmem")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")


@pytest.mark.parametrize(
    ("own", "groups", "names"),
    [
        ("0::/", {"": 5000}, V2),
        ("0::/user/run", {"user/run": 5000}, V2),
        ("0::/user/run", {"user": 5000, "user/run": 9000}, V2),  # the outer one is tighter
        ("0::/on/the/host", {"": 5000}, V2),  # a container that sees its own root only
        ("12:cpu,cpuacct:/a\n4:memory:/job/step\n0::/a", {"memory/job/step": 5000}, V1),
        ("4:memory:/job/step", {"memory": 1 << 62, "memory/job": 5000}, V1),
        ("0::/user/run", {"": "max", "user": 5000}, V2),
    ],
)
def test_every_group_that_holds_this_process_limits_its_memory(
    own, groups, names, tmp_path, monkeypatch
):
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    limit, used, cached, in_memory = names
    for group, most in groups.items():
        directory = tmp_path / "groups" / group
        directory.mkdir(parents=True, exist_ok=True)
        (directory / limit).write_text(f"{most}\n")
        (directory / used).write_text("4000\n")
        (directory / "memory.stat").write_text(f"anon 3300\n{cached} 900\n{in_memory} 200\n")
    assert memory.available_bytes() == 1700
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.hidden_budget() == 1700 // 2 // 4
    assert memory.hidden_budget(0) == 0

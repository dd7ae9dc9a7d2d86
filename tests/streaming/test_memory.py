from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cfsp
from cfsp.streaming import memory
from cfsp.streaming.memory import peak_rss_bytes

# Modules that some systems lack: whoever needs one imports it where it is needed.
NOT_EVERYWHERE = {"fcntl", "grp", "posix", "pwd", "resource", "termios", "winreg"}

PRINT_PEAK = "from cfsp.streaming.memory import peak_rss_bytes; print(peak_rss_bytes())"


def test_the_peak_stays_when_memory_is_given_back() -> None:
    before = peak_rss_bytes()
    block = b"x" * 400_000_000
    assert len(block) == 400_000_000
    del block
    assert peak_rss_bytes() > min(before, 1 << 30)
    assert peak_rss_bytes() >= 400_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="what a process inherits differs elsewhere")
def test_the_peak_is_not_that_of_the_program_it_was_started_from() -> None:
    # A process between, whose memory is large when it starts the one that is asked.
    program = (
        "import subprocess, sys; block = b'x' * 400_000_000; "
        f"print(subprocess.check_output([sys.executable, '-c', {PRINT_PEAK!r}], text=True))"
    )
    printed = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert 5_000_000 < int(printed) < 300_000_000


def test_nothing_at_import_time_excludes_an_operating_system() -> None:
    source = Path(cfsp.__file__).parent
    found = []
    for path in sorted(source.rglob("*.py")):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            names: set[str] = set()
            if isinstance(statement, ast.Import):
                names = {alias.name.partition(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom):
                names = {(statement.module or "").partition(".")[0]}
            found += [f"{path.relative_to(source)}: {name}" for name in names & NOT_EVERYWHERE]
    assert found == []


V2 = ("memory.max", "memory.current", "file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")


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
    own: str,
    groups: dict[str, int | str],
    names: tuple[str, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    limit, used, cached = names
    for group, most in groups.items():
        directory = tmp_path / "groups" / group
        directory.mkdir(parents=True, exist_ok=True)
        (directory / limit).write_text(f"{most}\n")
        (directory / used).write_text("4000\n")
        (directory / "memory.stat").write_text(f"anon 3300\n{cached} 700\n")
    assert memory.available_bytes() == 1700
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.default_budget() == 1700 // 2 // 4

"""A small run of benchmarks/kills.py: whole commands, killed at random moments, end the same."""

from __future__ import annotations

import subprocess
import sys

from conftest import REPOSITORY

KILLS = 2


def test_killed_commands_end_in_the_same_bytes() -> None:
    ended = subprocess.run(
        [sys.executable, "benchmarks/kills.py", "--kills", str(KILLS), "--seed", "0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    rows = [line.split("|") for line in ended.stdout.splitlines()[2:]]
    assert [(row[1].strip(), int(row[2]), int(row[4])) for row in rows] == [
        (f"`{name}`", KILLS, 0) for name in ("prune", "recover", "sweep")
    ]

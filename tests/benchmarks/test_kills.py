"""A small run of benchmarks/kills.py: a whole sweep, killed at random moments, ends the same.

Kills of the other commands are in streaming/test_resuming.py, recovery/test_recovery_ends.py and
quality/test_evaluate.py.
"""

from conftest import REPOSITORY

KILLS = 1


def test_a_killed_sweep_ends_in_the_same_bytes(forks):
    argv = ["kills.py", "--kills", str(KILLS), "--seed", "0", "--command", "sweep"]
    code = f"""
import sys
sys.argv = {argv}
sys.path.insert(0, {str(REPOSITORY / "benchmarks")!r})
import kills
sys.exit(kills.main())
"""
    (ended,) = forks.code(code)
    rows = [[cell.strip() for cell in line.split("|")] for line in ended.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["`sweep`"]
    assert all((int(row[2]), int(row[4])) == (KILLS, 0) for row in rows)

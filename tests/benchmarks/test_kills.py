"""A small run of benchmarks/kills.py: whole commands, killed at random moments, end the same."""

from conftest import REPOSITORY

KILLS = 1


def test_killed_commands_end_in_the_same_bytes(forks):
    argv = ["kills.py", "--kills", str(KILLS), "--seed", "0"]
    code = f"""
import sys
sys.argv = {argv}
sys.path.insert(0, {str(REPOSITORY / "benchmarks")!r})
import kills
sys.exit(kills.main())
"""
    (ended,) = forks.code(code)
    rows = [[cell.strip() for cell in line.split("|")] for line in ended.stdout.splitlines()[2:]]
    assert [row[1] for row in rows] == ["`prune`", "`recover`", "`sweep`", "`eval`"]
    assert all((int(row[2]), int(row[4])) == (KILLS, 0) for row in rows)

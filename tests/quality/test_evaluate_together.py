"""Several processes evaluate together: the numbers of one, and the same command goes on."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main
from cfsp.quality.streaming import joined_sums
from commands import Command, Commands, ranks
from tiny_models import BLOCKS


@pytest.fixture
def argv(
    tiny_checkpoint: Callable[[str], Path], text_file: Path, other_text_file: Path
) -> list[str]:
    models = ["eval", str(tiny_checkpoint("qwen3")), "--against", str(tiny_checkpoint("llama"))]
    windows = ["--windows", "5", "--seqlen", "32", "--batch-windows", "2", "--dtype", "float32"]
    return [*models, "--data", str(text_file), "--data", str(other_text_file), *windows]


def approximately(found: Any) -> Any:
    """Return results whose sums of window may differ by rounding."""
    if isinstance(found, dict):
        return {name: approximately(value) for name, value in found.items()}
    if isinstance(found, list) and found and not isinstance(found[0], float):
        return [approximately(value) for value in found]
    is_number = isinstance(found, float | list) and found != []
    return pytest.approx(found, rel=1e-5) if is_number else found


def test_two_processes_measure_what_one_measures(
    commands: Commands, argv: list[str], tmp_path: Path
) -> None:
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    expected = json.loads((tmp_path / "one").read_text())
    argv += ["--out", str(tmp_path / "two")]
    ended = commands(*(Command(argv, environment=rank) for rank in ranks(2)))
    assert [each.status for each in ended] == [0, 0], ended
    assert [bool(each.stdout) for each in ended] == [True, False]
    assert json.loads((tmp_path / "two").read_text()) == approximately(expected)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_after_a_death_the_same_command_goes_on(
    commands: Commands, argv: list[str], tmp_path: Path
) -> None:
    """Also where a process has nothing to do: of 4 windows there are 2 batches."""
    argv[argv.index("--windows") + 1] = "4"
    out = tmp_path / "many"
    argv_of_three = [*argv, "--out", str(out)]
    # Windows of the first text have passed both models.
    dying: dict[str, Any] = {"dies": "within", "count": 2 * BLOCKS + 1}
    deaths: list[dict[str, Any]] = [{}, {}, dying]
    ended = commands(
        *(
            Command([*argv_of_three, "--process-timeout", "0.3"], environment=rank, **death)
            for rank, death in zip(ranks(3), deaths, strict=True)
        )
    )
    assert [each.status for each in ended] == [2, 2, -signal.SIGKILL], ended
    assert not out.exists()
    ended = commands(*(Command(argv_of_three, environment=rank) for rank in ranks(3)))
    assert [each.status for each in ended] == [0, 0, 0], ended
    assert {path.name for path in tmp_path.iterdir()} == {"many"}
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    expected = json.loads((tmp_path / "one").read_text())
    assert json.loads(out.read_text()) == approximately(expected)
    ended = commands(*(Command(argv_of_three, environment=rank) for rank in ranks(2)))
    assert [each.status for each in ended] == [0, 0], ended
    assert "is there already; nothing is measured again" in ended[0].stderr


def test_tasks_are_refused(
    argv: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*argv, "--tasks", "piqa", "--out", str(tmp_path / "out")]) == 2
    message = "cfsp eval: [process 1] --tasks runs in one process, found 2"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sums_of_parts_are_those_of_all() -> None:
    parts = [{"loss": [1.0, 2.0], "agreed": [3, 4]}, {"loss": [], "agreed": []}]
    whole = joined_sums([*parts, {"loss": [4.0], "agreed": [5]}])
    assert whole == {"loss": [1.0, 2.0, 4.0], "agreed": [3, 4, 5]}

"""Several processes evaluate together: the numbers of one, and the same command goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from cfsp.cli import main
from cfsp.quality.perplexity import joined_sums
from commands import Command, ranks
from tiny_models import BLOCKS


@pytest.fixture
def argv(tiny_checkpoint, text_file, other_text_file) -> list[str]:
    models = ["eval", str(tiny_checkpoint("qwen3")), "--against", str(tiny_checkpoint("llama"))]
    windows = ["--windows", "4", "--seqlen", "32", "--batch-windows", "2", "--dtype", "float32"]
    return [*models, "--data", str(text_file), "--data", str(other_text_file), *windows]


def approximately(found: Any) -> Any:
    """Return results whose sums of window may differ by rounding."""
    if isinstance(found, dict):
        return {name: approximately(value) for name, value in found.items()}
    if isinstance(found, list) and found and not isinstance(found[0], float):
        return [approximately(value) for value in found]
    is_number = isinstance(found, float | list) and found != []
    return pytest.approx(found, rel=1e-5) if is_number else found


def of(path: Path) -> Any:
    return json.loads(path.read_text())


def test_after_a_death_the_same_command_goes_on(commands, argv, tmp_path):
    """To what one process measures; also where one has nothing to do: of 4 windows in twos."""
    out = tmp_path / "many"
    argv_of_three = [*argv, "--out", str(out)]
    # Windows of the first text have passed both models.
    dying: dict[str, Any] = {"dies": "within", "count": 2 * BLOCKS + 1}
    deaths: list[dict[str, Any]] = [{}, {}, dying]
    ended = commands(
        *(
            Command(argv_of_three, environment=rank, patience=18, **death)
            for rank, death in zip(ranks(3), deaths, strict=True)
        )
    )
    assert [each.status for each in ended] == [2, 2, -signal.SIGKILL], ended
    assert not out.exists()
    ended = commands(*(Command(argv_of_three, environment=rank) for rank in ranks(3)))
    assert [each.status for each in ended] == [0, 0, 0], ended
    assert [bool(each.stdout) for each in ended] == [True, False, False]
    assert {path.name for path in tmp_path.iterdir()} == {"many"}
    assert main([*argv, "--out", str(tmp_path / "one")]) == 0
    assert of(out) == approximately(of(tmp_path / "one"))
    (ended,) = commands(Command(argv_of_three))
    assert ended.status == 0
    assert "is there already; nothing is measured again" in ended.stderr


def test_tasks_are_refused(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main([*argv, "--tasks", "piqa", "--out", str(tmp_path / "out")]) == 2
    message = "cfsp eval: [process 1] --tasks runs in one process, found 2"
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sums_of_parts_are_those_of_all():
    parts = [{"loss": [1.0, 2.0], "agreed": [3, 4]}, {"loss": [], "agreed": []}]
    whole = joined_sums([*parts, {"loss": [4.0], "agreed": [5]}])
    assert whole == {"loss": [1.0, 2.0, 4.0], "agreed": [3, 4, 5]}

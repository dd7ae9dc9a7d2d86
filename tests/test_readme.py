"""The README's commands and its Python run as they stand, on a tiny model and a small text."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cfsp
from cfsp.cli import build_parser, main
from cfsp.cli.options import expand_sets
from cfsp.settings import CalibrationText
from conftest import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

# What makes a command of the README small enough for a test.
_SMALLER = {
    "prune": ["--samples", "8", "--seqlen", "64", "--multiple", "4"],
    "eval": ["--windows", "2", "--seqlen", "64"],
    "recover": ["--seqlen", "64", "--batch-windows", "2"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_commands_run(
    tiny_checkpoint: Callable[[str], Path],
    text_file: Path,
    other_text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    stand_ins = {
        "MODEL": str(tiny_checkpoint("llama")),
        "wikitext2": str(text_file),
        "c4": str(other_text_file),
        "yours.jsonl": str(text_file),
        "mixed": str(other_text_file),  # all of it takes seconds to cut into tokens
        # So many minutes would be waited for, and few are too short on a busy machine.
        "--max-minutes": "--steps",
        "30": "8",
    }
    commands = [line for block in blocks("sh") for line in block.splitlines() if line]
    assert [shlex.split(command)[1] for command in commands] == ["prune", "eval", "recover"]
    for command in commands:
        words = [stand_ins.get(word, word) for word in shlex.split(command)]
        assert main([*words[1:], *_SMALLER[words[1]]]) == 0, command
    assert (tmp_path / "recovered" / "model.safetensors").is_file()


def test_the_python_runs(
    tiny_checkpoint: Callable[[str], Path],
    tokenizer: Any,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(text_file.read_text())
    monkeypatch.setattr("cfsp.text.calibration_text.draw_text", _small_draw)
    (code,) = blocks("python")
    names = {
        "model_in_memory": cfsp.load(tiny_checkpoint("llama")),
        "tokenizer": tokenizer,
    }
    code = code.replace("path/to/model", str(tiny_checkpoint("llama")))
    exec(code, names)
    assert names["smaller"].num_parameters() < names["model_in_memory"].num_parameters()
    assert (tmp_path / "smaller" / "config.json").is_file()


def _small_draw(text: CalibrationText, tokenizer: Any, *_: Any) -> Any:
    from cfsp.text.drawing import draw_windows

    return draw_windows(text.names, tokenizer, samples=8, seqlen=64, seed=text.seed)


def test_its_picture_and_pages_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (REPOSITORY / target).is_file(), target


def test_the_commands_of_all_pages_are_understood() -> None:
    """Each that stands in a line of its own parses, but with `...`, one capital or `a|b` in it."""
    understood = 0
    for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for line in re.findall(r"^ +(?:\$ )?cfsp (\w+ .*)$", text, flags=re.MULTILINE):
            words = shlex.split(line, comments=True)
            if "..." in words or any(re.fullmatch(r"[A-Z]|.*\|.*", word) for word in words):
                continue
            _, unknown = build_parser().parse_known_args(expand_sets(words))
            assert not unknown, (page.name, line)
            understood += 1
    assert understood > 50

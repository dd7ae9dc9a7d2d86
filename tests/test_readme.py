"""The commands and the Python of the README and the first page run, on a tiny model and text."""

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import cfsp
from builders import draw_windows
from cfsp.cli import build_parser, main
from cfsp.cli.options import expand_sets
from cfsp.settings import CalibrationText
from cfsp.speed.subjects import ModelProcess
from conftest import REPOSITORY

README = REPOSITORY / "README.md"
FIRST = REPOSITORY / "docs/first-fifteen-minutes.md"

# What makes a command small enough for a test.
_SMALLER = {
    "prune": ["--samples", "8", "--seqlen", "64", "--multiple", "4"],
    "eval": ["--windows", "2", "--seqlen", "64"],
    "recover": ["--seqlen", "64", "--batch-windows", "8"],
    "bench": ["--rounds", "1", "--prompt", "8", "--new-tokens", "2"],
}


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("page", [README, FIRST], ids=lambda page: page.stem)
@pytest.mark.usefixtures("models_start_quickly")
def test_the_commands_run(page, model, text_file, other_text_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cfsp.quality.answers.ANSWER_TOKENS", 4)
    timed = ModelProcess.run  # a busy machine gives no verdict
    monkeypatch.setattr(ModelProcess, "run", lambda *args: replace(timed(*args), disturbance=0.0))
    stand_ins = {
        "MODEL": str(model),
        "demo": str(model),
        "wikitext2": str(text_file),
        "c4": str(other_text_file),
        "python-docs": str(text_file),
        "yours.jsonl": str(text_file),
        "mixed": str(other_text_file),  # all of it takes seconds to cut into tokens
        # So many minutes would be waited for, and few are too short on a busy machine.
        "--max-minutes": "--steps",
        "30": "4",
    }
    commands = [line for block in blocks(page, "sh") for line in block.splitlines() if line]
    assert len(commands) >= 3
    for command in commands:
        words = [stand_ins.get(word, word) for word in shlex.split(command)]
        assert words[0] == "cfsp"
        assert main([*words[1:], *_SMALLER.get(words[1], [])]) == 0, command
    assert (tmp_path / "recovered" / "model.safetensors").is_file()
    served = re.findall("serve it: (.*)", capsys.readouterr().out)
    assert all(f"\n    {command}\n" in page.read_text(encoding="utf-8") for command in served)
    assert len(served) == sum(" export " in command for command in commands)


def test_the_python_runs(model, tokenizer, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(text_file.read_text())
    monkeypatch.setattr("cfsp.text.drawing.draw_text", _small_draw)
    (code,) = blocks(README, "python")
    names = {"model_in_memory": cfsp.load(model), "tokenizer": tokenizer}
    exec(code.replace("path/to/model", str(model)), names)
    assert names["smaller"].num_parameters() < names["model_in_memory"].num_parameters()
    assert (tmp_path / "smaller" / "config.json").is_file()
    (code,) = blocks(FIRST, "python")
    exec(code.replace("recovered", "smaller"), names)
    assert names["model"].num_parameters() == names["smaller"].num_parameters()


def _small_draw(text: CalibrationText, tokenizer: Any, *_: Any) -> Any:
    return draw_windows(text.names, tokenizer, samples=8, seqlen=64, seed=text.seed)


def test_its_picture_and_pages_exist():
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (REPOSITORY / target).is_file(), target


def test_the_commands_of_all_pages_are_understood():
    """Each that stands in a line of its own parses, but with `...`, one capital or `a|b` in it."""
    understood = 0
    for page in [README, *sorted((REPOSITORY / "docs").glob("*.md"))]:
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        for line in re.findall(r"^ +(?:\$ )?cfsp (\w+ .*)$", text, flags=re.MULTILINE):
            words = shlex.split(line, comments=True)
            if "..." in words or any(re.fullmatch(r"[A-Z]|.*\|.*", word) for word in words):
                continue
            _, unknown = build_parser().parse_known_args(expand_sets(words))
            assert not unknown, (page.name, line)
            understood += 1
    assert understood > 50

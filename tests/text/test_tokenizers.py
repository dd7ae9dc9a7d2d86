"""Reading the tokenizer or processor of a directory runs no code of it and asks nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfsp.errors import CheckpointError
from cfsp.text.tokenizers import load_processor, load_tokenizer
from image_processors import image_tokenizer, tiny_processor

CODE = "raise SystemExit('the code was run')"


def with_own_code(directory: Path, name: str, auto_class: str) -> None:
    """Let a file of a directory name a class that is in the directory and nowhere else."""
    fields = json.loads((directory / name).read_text())
    key = {"AutoTokenizer": "tokenizer_class", "AutoProcessor": "processor_class"}[auto_class]
    own: Any = "own.Own" if auto_class == "AutoProcessor" else ["own.Own", None]
    fields |= {key: "Own", "auto_map": {auto_class: own}}
    (directory / name).write_text(json.dumps(fields))
    (directory / "own.py").write_text(CODE)


@pytest.mark.parametrize(
    ("load", "name", "auto_class"),
    [
        (load_tokenizer, "tokenizer_config.json", "AutoTokenizer"),
        (load_processor, "tokenizer_config.json", "AutoTokenizer"),
        (load_processor, "processor_config.json", "AutoProcessor"),
    ],
)
def test_own_code_is_refused_and_nobody_is_asked(
    tmp_path, monkeypatch, capfd, load, name, auto_class
):
    tokenizer = image_tokenizer(tmp_path / "tokenizer", bos=True)
    tiny_processor("llava", tokenizer).save_pretrained(tmp_path)
    with_own_code(tmp_path, name, auto_class)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(CheckpointError, match="code of its own, which cfsp does not run"):
        load(tmp_path)
    assert not asked
    assert not capfd.readouterr().out

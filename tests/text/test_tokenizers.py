"""Reading the tokenizer or processor of a directory runs no code of it and asks nobody."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cfsp
from cfsp.errors import CheckpointError
from cfsp.text.tokenizers import load_processor, load_tokenizer
from image_processors import image_tokenizer, tiny_processor

CODE = "raise SystemExit('the code was run')"
# Files that cfsp has written itself, or whose code is compared with our own before.
OWN_CODE = {"exports/decilm.py", "families/stock.py"}


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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    load: Callable[[Path], Any],
    name: str,
    auto_class: str,
) -> None:
    tokenizer = image_tokenizer(tmp_path / "tokenizer", bos=True)
    tiny_processor("llava", tokenizer).save_pretrained(tmp_path)
    with_own_code(tmp_path, name, auto_class)
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    with pytest.raises(CheckpointError, match="code of its own, which cfsp does not run"):
        load(tmp_path)
    assert not asked
    assert not capfd.readouterr().out


def test_whatever_an_auto_class_reads_runs_no_code() -> None:
    root = Path(cfsp.__file__).parent
    silent = []
    for path in sorted(root.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_one = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
            if not is_one or call.func.attr != "from_pretrained":
                continue
            said = {key.arg: ast.unparse(key.value) for key in call.keywords}
            place = str(path.relative_to(root))
            if "auto" not in ast.unparse(call.func).lower() or place in OWN_CODE:
                continue
            if said.get("trust_remote_code") != "False":
                silent.append(f"{place}:{call.lineno}")
    assert not silent

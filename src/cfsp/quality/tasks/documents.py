"""Documents of a task from a local JSONL file, for the harness tasks in `jsonl/`.

A line is {"query", "choices", "gold"}, or {"context_options", "continuation", "gold"} where the
context is what differs; gold is the index of the right choice or context. Of a passage whose last
word is to be told, a line is {"text"}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cfsp.errors import TaskError

_FIELDS = (
    {"query": str, "choices": list, "gold": int},
    {"context_options": list, "continuation": str, "gold": int},
    {"text": str},
)


def load_documents(directory: str, file: str, **_: Any) -> dict[str, Any]:
    """Return the split `test` of a task, as the harness's `custom_dataset` has to.

    The directory is `metadata` of the task manager, the file is `metadata` of the task.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(read_documents(Path(directory) / file))}


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Return the documents of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"cannot read the task file {path}: {error}; --task-data is the directory that has it"
        ) from error
    documents = [
        _document(line, f"{path}, line {number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not documents:
        raise TaskError(f"{path} holds no documents")
    return documents


def _document(line: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where}: not JSON: {error}") from error
    for fields in _FIELDS:
        if isinstance(document, dict) and all(
            type(document.get(name)) is kind for name, kind in fields.items()
        ):
            if "text" in fields:
                return _passage(document["text"], where)
            options = document.get("choices") or document.get("context_options") or []
            if not 0 <= document["gold"] < len(options):
                raise TaskError(
                    f"{where}: gold is {document['gold']}, but there are {len(options)} choices"
                )
            if not all(isinstance(option, str) and option for option in options):
                raise TaskError(f"{where}: a choice is empty or not text")
            return {name: document[name] for name in fields}
    found = ", ".join(document) if isinstance(document, dict) else type(document).__name__
    raise TaskError(
        f"{where}: expected query, choices and gold, or context_options, continuation and gold "
        f"(text, list, index), or text; found: {found}"
    )


def _passage(text: str, where: str) -> dict[str, Any]:
    before, _, last = text.rpartition(" ")
    if not before.strip() or not last:
        raise TaskError(
            f"{where}: expected a text whose last word follows a space, found {text[-40:]!r}"
        )
    return {"text": text}

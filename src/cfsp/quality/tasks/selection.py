"""Which tasks to run, how, and on which documents. Imports nothing heavy.

A line of a local JSONL file is {"query", "choices", "gold"}, or {"context_options", "continuation",
"gold"} where the context is what differs; gold is the index of the right choice or context. Of a
passage whose last word is to be told, a line is {"text"}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import hub_is_missed
from cfsp.errors import TaskError, UsageError, did_you_mean
from cfsp.settings import Declared, check_encodes, option

# The tasks of the paper's tables, by their names in the harness.
PAPER_SUITE = (
    "hellaswag", "piqa", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "boolq", "mmlu",
)  # fmt: skip
JSONL_TASKS = Path(__file__).with_name("jsonl")  # of the harness tasks that read JSONL files
SUITES = {"cfsp-paper": PAPER_SUITE}
DEFAULT_BATCH = 8
# Documents or examples; at most more than there are.
_count = partial(option, None, kind=int, most=1 << 32)
# Of a document, by the form that the metadata of its task names.
_FORMS: dict[str, dict[str, type]] = {
    "choices": {"query": str, "choices": list, "gold": int},
    "contexts": {"context_options": list, "continuation": str, "gold": int},
    "passage": {"text": str},
}
DEFAULT_FORM = "choices"
_IN_WORDS = {str: "text", list: "list", int: "index"}


@dataclass(frozen=True)
class TaskSelection(Declared):
    """Tasks and how to run them."""

    names: tuple[str, ...]  # of tasks, groups or tags of the harness, or of `SUITES`
    limit: int | None = _count("first N documents of each task", least=1)
    shots: int | None = _count(
        "solved examples before each question",
        least=0,
        metavar="K",
        default="as the task says, mostly 0",
    )
    data: Path | None = None  # directory of JSONL files; None for the harness's own, from the hub
    batch: int = DEFAULT_BATCH  # requests that pass together

    def __post_init__(self) -> None:
        if not self.names:
            raise UsageError("expected at least one task, found none; give --tasks piqa,arc_easy")
        super().__post_init__()
        if self.data is not None and not self.data.is_dir():
            what = "is no directory" if self.data.exists() else "does not exist"
            raise TaskError(
                f"the task directory {self.data} {what}; give the one with the JSONL files"
            )

    @property
    def task_names(self) -> list[str]:
        """Names with suites replaced by their tasks, each once, in the order given."""
        names = [task for name in self.names for task in SUITES.get(name, (name,))]
        return list(dict.fromkeys(names))

    def check_source(self) -> None:
        """Check that the hub can be reached; its own client tries for half a minute."""
        if self.data is None and hub_is_missed():
            raise TaskError(
                f"the hub, which has the data of {', '.join(self.task_names)}, cannot be reached "
                "from here; give local files with --task-data, or set HF_HUB_OFFLINE=1 to read a "
                "copy in its cache"
            )


def check_known(names: list[str], known: list[str], where: str) -> None:
    """Check that every task is known, or tell of names that look alike."""
    for name in names:
        if name not in known:
            usual = [task for suite in SUITES.values() for task in suite if task in known]
            raise TaskError(
                f"{where} has no task {name!r}{did_you_mean(name, [*known, *SUITES])}; it has, for "
                f"example: {', '.join((usual or known)[:12])}"
            )


def load_documents(directory: str, file: str, form: str = DEFAULT_FORM, **_: Any) -> dict[str, Any]:
    """Return the split `test` of a task, as the harness's `custom_dataset` has to.

    The directory is `metadata` of the task manager, file and form are `metadata` of the task.
    """
    from datasets import Dataset

    return {"test": Dataset.from_list(read_documents(Path(directory) / file, form))}


def read_documents(path: Path, form: str = DEFAULT_FORM) -> list[dict[str, Any]]:
    """Return the documents of a file, which all have one form."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"cannot read the task file {path}: {error}; --task-data is the directory that has it"
        ) from error
    documents = [
        _document(line, f"{path}, line {number}", form)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not documents:
        raise TaskError(f"{path} holds no documents")
    return documents


def _document(line: str, where: str, form: str) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise TaskError(f"{where}: not JSON: {error}") from error
    check_encodes(json.dumps(document, ensure_ascii=False), where)
    fields = _FORMS[form]
    if not isinstance(document, dict) or any(
        type(document.get(name)) is not kind for name, kind in fields.items()
    ):
        expected = ", ".join(f"{name} ({_IN_WORDS[kind]})" for name, kind in fields.items())
        found = ", ".join(document) if isinstance(document, dict) else type(document).__name__
        raise TaskError(f"{where}: expected {expected}; found: {found}")
    if form == "passage":
        before, _, last = document["text"].rpartition(" ")
        if not before.strip() or not last:
            raise TaskError(
                f"{where}: expected a text whose last word follows a space, found "
                f"{document['text'][-40:]!r}"
            )
        return {"text": document["text"]}
    options = document.get("choices") or document.get("context_options") or []
    if not 0 <= document["gold"] < len(options):
        raise TaskError(
            f"{where}: gold is {document['gold']}, but there are {len(options)} choices"
        )
    if not all(isinstance(option, str) and option for option in options):
        raise TaskError(f"{where}: a choice is empty or not text")
    read = {name: document[name] for name in fields}
    if form == "contexts":
        # As the harness does: it puts a space before it.
        read["continuation"] = read["continuation"].strip()
        if not read["continuation"]:
            raise TaskError(f"{where}: the continuation is empty")
    return read

"""Where documents come from: offline prose, local files, or data sets on the hub.

What `--data` takes:

    python-docs                  Python's own reference prose, in every CPython
    python-source                source code of the standard library, in every CPython
    wikitext2, c4                the usual data sets, from the hub
    NAME:CONFIG:SPLIT:COLUMN     any other data set on the hub
    PATH.txt, .jsonl, .parquet   local files (PATH:COLUMN for another column than `text`)
    DIRECTORY                    written by `datasets.Dataset.save_to_disk`

and, to calibrate on, `self`: text that the model writes (`cfsp.whole_model.own_text`).

The column `messages` holds conversations: lists of {"role", "content"}. Only recovery reads them;
of a local file it need not be named where there is no `text`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cfsp.errors import MissingExtraError, TextError
from cfsp.text.offline import python_docs, python_source

Purpose = Literal["calibration", "evaluation"]

Conversation = list[dict[str, str]]
CHAT_COLUMN = "messages"

_OFFLINE: dict[str, Callable[[Purpose], Iterator[str]]] = {
    "python-docs": python_docs,
    "python-source": python_source,
}

# Short name -> hub id, config, split for each purpose, column.
_HUB: dict[str, tuple[str, str, dict[Purpose, str], str]] = {
    "wikitext2": (
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"calibration": "train", "evaluation": "test"},
        "text",
    ),
    "c4": ("allenai/c4", "en", {"calibration": "train", "evaluation": "validation"}, "text"),
}


@dataclass(frozen=True)
class TextSource:
    """A named stream of documents.

    Attributes:
        name: what the user called it.
        purpose: what it is read for; sources with several parts give disjoint ones.
    """

    name: str
    purpose: Purpose

    @property
    def is_chat(self) -> bool:
        """Whether the source holds conversations instead of documents."""
        return _split_column(self.name)[1] == CHAT_COLUMN or self.name.endswith(f":{CHAT_COLUMN}")

    def documents(self) -> Iterator[str]:
        """Yield the documents, in the source's own order.

        Raises:
            TextError: the source does not exist or is not readable as text.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        if self.is_chat:
            raise TextError(f"{self.name} holds conversations; only cfsp recover reads those")
        return self._values()

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations of a chat source, in its own order.

        Raises:
            TextError: the source does not exist or a record is not a conversation.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        assert self.is_chat, self.name
        return self._values()

    def _values(self) -> Iterator[Any]:
        if self.name in _OFFLINE:
            return _OFFLINE[self.name](self.purpose)
        if self.name in _HUB:
            hub_id, config, splits, column = _HUB[self.name]
            return _hub_documents(hub_id, config, splits[self.purpose], column)
        path, column = _split_column(self.name)
        if path.exists():
            return _local_documents(path, column)
        parts = self.name.split(":")
        if len(parts) == 4:
            return _hub_documents(parts[0], parts[1], parts[2], parts[3])
        raise TextError(
            f"{self.name} is neither a file nor a known text; "
            f"known are: {', '.join([*_OFFLINE, *_HUB])}, or NAME:CONFIG:SPLIT:COLUMN on the hub"
        )


def _split_column(name: str) -> tuple[Path, str]:
    path = Path(name).expanduser()
    if not path.exists() and ":" in name:
        before, column = name.rsplit(":", 1)
        if Path(before).expanduser().exists():
            return Path(before).expanduser(), column
    return path, CHAT_COLUMN if _holds_only_chat(path) else "text"


def _holds_only_chat(path: Path) -> bool:
    """Return whether a local .jsonl file has conversations where others have text."""
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            record = json.loads(next(file, ""))
    except (ValueError, OSError, RecursionError):
        return False  # reading it will say what is wrong
    return isinstance(record, dict) and CHAT_COLUMN in record and "text" not in record


def _local_documents(path: Path, column: str) -> Iterator[Any]:
    if path.is_dir():
        return _saved_dataset(path, column)
    readers = {".txt": _text_file, ".jsonl": _json_lines, ".parquet": _parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise TextError(
            f"{path} has an unknown ending; expected {', '.join(readers)} or a directory "
            "written by datasets"
        )
    return reader(path, column)


def _text_file(path: Path, column: str) -> Iterator[Any]:
    yield _read_text(path)


def _json_lines(path: Path, column: str) -> Iterator[Any]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(
                f"{path}, line {number}: not JSON: {error}; every line must be one JSON object"
            ) from error
        yield _field(record, column, f"{path}, line {number}")


def _parquet(path: Path, column: str) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("reading a .parquet file", "data") from error
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise TextError(f"{path} has no column {column!r}; it has: {', '.join(names)}")
        for batch in file.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _field({column: value}, column, str(path))
    except pa.ArrowException as error:
        raise TextError(f"{path} is not a readable parquet file: {error}") from error


def _saved_dataset(path: Path, column: str) -> Iterator[Any]:
    datasets = _datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many types here
        raise TextError(f"{path} was not written by datasets' save_to_disk: {error}") from error
    if isinstance(data, dict):
        raise TextError(f"{path} holds several splits ({', '.join(data)}); name one: {path}/SPLIT")
    if column not in data.column_names:
        raise TextError(f"{path} has no column {column!r}; it has: {', '.join(data.column_names)}")
    return (_field(record, column, str(path)) for record in data)


def _hub_documents(hub_id: str, config: str, split: str, column: str) -> Iterator[Any]:
    datasets = _datasets()
    try:
        data = datasets.load_dataset(hub_id, config or None, split=split, streaming=True)
        for record in data:
            yield _field(record, column, hub_id)
    except TextError:
        raise
    except Exception as error:  # network, hub and parsing errors of many types
        raise TextError(
            f"the hub does not serve {hub_id} ({config}, {split}) now "
            f"({type(error).__name__}); check the name and the network, or give a local file"
        ) from error


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("this text source", "data") from error
    return datasets


def _field(record: Any, column: str, where: str) -> Any:
    if not isinstance(record, dict) or column not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise TextError(f"{where}: no column {column!r}; found: {keys}")
    value = record[column]
    if column == CHAT_COLUMN:
        return _conversation(value, where)
    if not isinstance(value, str):
        raise TextError(f"{where}: column {column!r} is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{where}: half of a surrogate pair at character {error.start}, which is no text; "
            "leave that line out"
        ) from error
    return value


def _conversation(value: Any, where: str) -> Conversation:
    """Check that a value is a list of messages, each with a role and a content."""
    if not isinstance(value, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    ):
        raise TextError(
            f"{where}: column {CHAT_COLUMN!r} must be a list of messages, each with the texts "
            f'"role" and "content", found {str(value)[:60]}'
        )
    return value


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text: byte {error.start} is not valid; save it as UTF-8"
        ) from error
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    if "\0" in text:
        raise TextError(f"{path} is binary: it holds NUL characters; save it as UTF-8 text")
    return text

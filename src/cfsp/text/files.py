"""Documents in local files: .txt, .jsonl, .parquet, and directories that datasets wrote."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cfsp.errors import MissingExtraError, TextError
from cfsp.text.chats import CHAT_COLUMN, checked_conversation


def local_documents(path: Path, column: str) -> Iterator[Any]:
    """Return what a column of a file or directory holds, in its own order.

    Args:
        path: exists.
        column: of the documents; conversations where it is `messages`.

    Raises:
        TextError: it is not readable as text.
        MissingExtraError: it needs the package datasets or pyarrow.
    """
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
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(_checked(line.decode, where))
        except (ValueError, RecursionError) as error:
            raise TextError(
                f"{where}: not JSON: {error}; every line must be one JSON object"
            ) from error
        yield field(record, column, where)


def _lines(path: Path) -> Iterator[bytes]:
    try:
        # As bytes, because only Python takes other characters for line ends as well.
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


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
                yield field({column: value}, column, str(path))
    except pa.ArrowException as error:
        raise TextError(f"{path} is not a readable parquet file: {error}") from error


def _saved_dataset(path: Path, column: str) -> Iterator[Any]:
    datasets = import_datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many types here
        raise TextError(f"{path} was not written by datasets' save_to_disk: {error}") from error
    if isinstance(data, dict):
        raise TextError(f"{path} holds several splits ({', '.join(data)}); name one: {path}/SPLIT")
    if column not in data.column_names:
        raise TextError(f"{path} has no column {column!r}; it has: {', '.join(data.column_names)}")
    return (field(record, column, str(path)) for record in data)


def import_datasets() -> Any:
    """Return the package datasets.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("this text source", "data") from error
    return datasets


def field(record: Any, column: str, where: str) -> Any:
    """Return the document in a record: text, or a conversation in the column `messages`.

    Raises:
        TextError: there is none.
    """
    if not isinstance(record, dict) or column not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise TextError(f"{where}: no column {column!r}; found: {keys}")
    value = record[column]
    if column == CHAT_COLUMN:
        return checked_conversation(value, where)
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


def _read_text(path: Path) -> str:
    try:
        return _checked(lambda: path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def _checked(decode: Callable[[], str], where: str) -> str:
    """Return the text that a function decodes.

    Raises:
        TextError: it is none.
    """
    try:
        text = decode()
    except UnicodeDecodeError as error:
        raise TextError(
            f"{where} is not UTF-8 text: byte {error.start} is not valid; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise TextError(f"{where} is binary: it holds NUL characters; save it as UTF-8 text")
    return text

"""Records of files and of data sets, and the document in one: a text, or a conversation.

A file of plain text has no records: it is one document in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from cfsp.checkpoint.locating import hub_is_missed, why_not_written
from cfsp.errors import MissingExtraError, TextError
from cfsp.text.chats import (
    CHAT_COLUMN,
    Conversation,
    checked_conversation,
    checked_messages,
)

IMAGE_COLUMN = "images"

# A record, and where it is.
Record = tuple[Any, str]

# A text file is read in pieces of about so many characters.
_PIECE_CHARACTERS = 4096
# How much of a file of lines is looked at to see what columns it has.
_LINES_LOOKED_AT = 64


def value_of(record: Any, column: str, where: str) -> Any:
    """Return what a record has in a column, or raise TextError: there is no such column."""
    if not isinstance(record, dict) or column not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise TextError(f"{where}: no column {column!r}; found: {keys}")
    return record[column]


def document_of(record: Any, column: str, where: str, *, beside_images: bool = False) -> Any:
    """Return the document in a record: text, or a conversation in the column `messages`.

    `beside_images` says that there is a column of images, of which nothing is taken.
    """
    value = value_of(record, column, where)
    if column == CHAT_COLUMN:
        beside_images = beside_images or record.get(IMAGE_COLUMN) is not None
        return checked_conversation(value, where, beside_images=beside_images)
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


@dataclass(frozen=True)
class Sample:
    """A conversation, and the images that belong to it."""

    messages: Conversation  # contents are lists of parts
    images: tuple[Any, ...]  # paths, bytes or pictures, in the order of their places
    where: str  # file and line, for errors


def sample_of(record: Any, where: str, directory: Path | None) -> Sample:
    """Return what a record has in its columns of messages and of images.

    An image is a path, relative to `directory` (where that is None, images are no paths); or
    {"bytes", "path"}, as parquet files and data sets store it; or a picture of Pillow.
    """
    messages = checked_messages(value_of(record, CHAT_COLUMN, where), where)
    found = record.get(IMAGE_COLUMN)
    if found is None:
        found = []
    values = list(found) if isinstance(found, list | tuple) else [found]
    images = tuple(_image(value, where, directory) for value in values)
    return Sample(_with_places(messages, images, where), images, where)


def _image(value: Any, where: str, directory: Path | None) -> Any:
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        if "://" in value or directory is None:
            raise TextError(
                f"{where}: image {value[:60]!r} is not a local file; download it and name its path"
            )
        return directory / value
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return value
    raise TextError(
        f"{where}: column {IMAGE_COLUMN!r} has a {type(value).__name__}, expected paths, "
        '{"bytes", "path"} or pictures'
    )


def _with_places(messages: Conversation, images: Sequence[Any], where: str) -> Conversation:
    """Return a conversation that says where each image is; first of all if nothing is said."""
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if places == len(images):
        return messages
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if places or first is None:
        raise TextError(
            f'{where}: the messages have {places} parts {{"type": "image"}}, the column '
            f"{IMAGE_COLUMN!r} has {len(images)}; there must be one for each"
        )
    added = [{"type": "image"} for _ in images] + messages[first]["content"]
    return [*messages[:first], {**messages[first], "content": added}, *messages[first + 1 :]]


# Local files and directories.


def is_text_file(path: Path) -> bool:
    """Return whether a path is that of a file of plain text, which is one document in pieces."""
    return path.suffix == ".txt" and not path.is_dir()


def column_names(path: Path, lines: int = _LINES_LOOKED_AT) -> set[str]:
    """Return the columns that a local file or directory has, as its beginning shows.

    What is null in the first lines of a .jsonl file does not count. What cannot be read has none:
    reading it will say what is wrong.
    """
    try:
        if path.is_dir():
            info = json.loads((path / "dataset_info.json").read_text(encoding="utf-8"))
            return set(info["features"])
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return set(pq.read_schema(path).names)
        if path.suffix != ".jsonl" or not path.is_file():
            return set()
        with path.open("rb") as file:
            records = [json.loads(line) for line in islice(file, lines) if line.strip()]
    except (ValueError, OSError, RecursionError, ImportError, KeyError, TypeError):
        return set()
    dictionaries = [record for record in records if isinstance(record, dict)]
    return {name for record in dictionaries for name, value in record.items() if value is not None}


def local_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Return the records of a file or directory that exists: the first column must be there."""
    if path.is_dir():
        return _saved_dataset(path, columns)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet(path, columns)
    raise TextError(
        f"{path} has an unknown ending; expected .txt, .jsonl, .parquet or a directory "
        "written by datasets"
    )


def text_file(path: Path) -> Iterator[str]:
    """Yield a text in pieces that end with a line and follow one another."""
    held = ""
    for number, line in enumerate(_lines(path), start=1):
        text = _checked(line.decode, f"{path}, line {number}")
        held += text.replace("\r\n", "\n").replace("\r", "\n")
        if len(held) >= _PIECE_CHARACTERS:
            yield held
            held = ""
    if held:
        yield held


def _json_lines(path: Path) -> Iterator[Record]:
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
        yield record, where


def _lines(path: Path) -> Iterator[bytes]:
    try:
        # As bytes, because only Python takes other characters for line ends as well.
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("reading a .parquet file", "data") from error
    try:
        file = pq.ParquetFile(path)
        wanted = _present(columns, file.schema_arrow.names, path)
        # Images are large: not more than a few at a time.
        rows = {"batch_size": 16} if IMAGE_COLUMN in columns else {}
        for batch in file.iter_batches(columns=wanted, **rows):
            for record in batch.to_pylist():
                yield record, str(path)
    except pa.ArrowException as error:
        raise TextError(f"{path} is not a readable parquet file: {error}") from error


def _saved_dataset(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    datasets = import_datasets()
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many types here
        raise TextError(f"{path} was not written by datasets' save_to_disk: {error}") from error
    if isinstance(data, dict):
        raise TextError(f"{path} holds several splits ({', '.join(data)}); name one: {path}/SPLIT")
    wanted = _present(columns, data.column_names, path)
    try:
        for record in data.select_columns(wanted):
            yield record, str(path)
    except ImportError as error:  # Pillow: data sets decode pictures
        raise MissingExtraError("reading images", "images") from error


def _present(columns: Sequence[str], names: Sequence[str], path: Path) -> list[str]:
    """Return those of some columns that there are; the first must be one of them."""
    if columns[0] not in names:
        raise TextError(f"{path} has no column {columns[0]!r}; it has: {', '.join(names)}")
    return [column for column in columns if column in names]


def _checked(decode: Callable[[], str], where: str) -> str:
    """Return the text that a function decodes, or raise TextError."""
    try:
        text = decode()
    except UnicodeDecodeError as error:
        raise TextError(
            f"{where} is not UTF-8 text: byte {error.start} is not valid; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise TextError(f"{where} is binary: it holds NUL characters; save it as UTF-8 text")
    return text


# Data sets on the hub, read as a stream.


@cache
def hub_columns(hub_id: str, config: str, split: str) -> frozenset[str]:
    """Return the columns of a data set."""
    record, _ = next(hub_records(hub_id, config, split), ({}, ""))
    return frozenset(record)


def hub_records(hub_id: str, config: str, split: str) -> Iterator[Record]:
    """Yield the records of a data set, in its own order."""
    datasets = import_datasets()
    if hub_is_missed():
        raise TextError(
            f"the hub, which has {hub_id}, cannot be reached from here; give a local file "
            "or mixed, or set HF_HUB_OFFLINE=1 to read a copy in its cache"
        )
    try:
        data = datasets.load_dataset(hub_id, config or None, split=split, streaming=True)
        for record in data:
            yield record, hub_id
    except ImportError as error:  # Pillow: data sets decode pictures
        raise MissingExtraError("reading images", "images") from error
    except Exception as error:  # network, hub and parsing errors of many types
        if why := why_not_written(error):
            raise TextError(f"{hub_id} cannot be read: {why}") from error
        raise TextError(
            f"the hub does not serve {hub_id} ({config}, {split}) now "
            f"({type(error).__name__}); check the name and the network, or give a local file"
        ) from error


def import_datasets() -> Any:
    """Return the package datasets, or raise MissingExtraError."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("this text source", "data") from error
    return datasets

"""Records of files and of data sets, and the document in one: a text, or a conversation.

A file of plain text has no records: it is one document in pieces. A conversation is a list of
messages, of which a model's chat template makes text.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.locating import hub_is_missed, why_not_written
from cfsp.errors import MissingExtraError, TextError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_COLUMN, IMAGE_COLUMN = "messages", "images"
# Contents are texts; beside images they are lists of parts.
Conversation = list[dict[str, Any]]

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
    """Return the document in a record: text, or a conversation without its images."""
    value = value_of(record, column, where)
    if column == CHAT_COLUMN:
        beside_images = beside_images or record.get(IMAGE_COLUMN) is not None
        messages = checked_messages(value, where)
        parts = [part for message in messages for part in message["content"]]
        if not beside_images and any(part["type"] == "image" for part in parts):
            raise TextError(
                f"{where}: a message has an image, but there is no column 'images' beside the "
                "messages"
            )
        return [
            {**message, "content": "".join(part.get("text", "") for part in message["content"])}
            for message in messages
        ]
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


# Conversations.


def conversation_texts(
    conversations: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase
) -> Iterator[str]:
    """Yield the text of each conversation, all speakers included."""
    check_has_template(tokenizer)
    for number, conversation in enumerate(conversations, start=1):
        yield templated(conversation, tokenizer, number)


def check_has_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer can write conversations as text, or raise TextError."""
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            "the model's tokenizer has no chat template, which chat data needs; give plain text, "
            "or an instruct model"
        )


def templated(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    **asked: bool,
) -> str:
    """Return the text that the chat template makes of a conversation, whose number errors name.

    The template is asked for more by name: `add_generation_prompt` ends it with what asks for an
    answer, and without `enable_thinking` a model that thinks first answers at once.
    """
    template: Any = tokenizer.apply_chat_template

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            text: str = template(messages, tokenize=False, **asked)
        except Exception as error:  # templates raise what they like
            raise TextError(
                f"conversation {number} does not fit the chat template: {error}"
            ) from error
        return text

    text = render(conversation)
    contents = [content for m in conversation if (content := m["content"].strip())]
    if not contents or any(content in text for content in contents):
        return text
    # Templates of some multimodal models look at the parts of a message, and see none in a text.
    return render(
        [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation]
    )


def checked_messages(value: Any, where: str) -> Conversation:
    """Return messages with their contents as lists of text and image parts."""
    found = value if isinstance(value, list) and all(isinstance(m, dict) for m in value) else None
    contents = [_parts(message.get("content")) for message in found or ()]
    roles = [message.get("role") for message in found or ()]
    if found is None or None in contents or not all(isinstance(role, str) for role in roles):
        raise TextError(
            f"{where}: column {CHAT_COLUMN!r} must be a list of messages, each with the texts "
            f'"role" and "content", found {str(value)[:60]}'
        )
    return [{**message, "content": parts} for message, parts in zip(found, contents, strict=True)]


def _parts(content: Any) -> list[dict[str, str]] | None:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        return None
    parts: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            parts.append({"type": "image"})
        else:
            return None
    return parts


# Local files.


def is_text_file(path: Path) -> bool:
    """Return whether a path is that of a file of plain text, which is one document in pieces."""
    return path.suffix.lower() == ".txt" and not path.is_dir()


def column_names(path: Path, lines: int = _LINES_LOOKED_AT) -> set[str]:
    """Return the columns that a local file has, as its beginning shows.

    What is null in the first lines of a .jsonl file does not count. What cannot be read has none:
    reading it will say what is wrong.
    """
    try:
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            return set(pq.read_schema(path).names)
        if path.suffix.lower() != ".jsonl" or not path.is_file():
            return set()
        with path.open("rb") as file:
            records = [json.loads(line) for line in islice(file, lines) if line.strip()]
    except (ValueError, OSError, RecursionError, ImportError):
        return set()
    dictionaries = [record for record in records if isinstance(record, dict)]
    return {name for record in dictionaries for name, value in record.items() if value is not None}


def local_records(path: Path, columns: Sequence[str]) -> Iterator[Record]:
    """Return the records of a file that exists: the first column must be there."""
    if path.suffix.lower() == ".jsonl":
        return _json_lines(path)
    if path.suffix.lower() == ".parquet":
        return _parquet(path, columns)
    raise TextError(
        f"{path} has an unknown ending; expected .txt, .jsonl or .parquet, which datasets write by "
        "to_parquet"
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
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
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
        names = file.schema_arrow.names
        if columns[0] not in names:
            raise TextError(f"{path} has no column {columns[0]!r}; it has: {', '.join(names)}")
        wanted = [column for column in columns if column in names]
        # Images are large: not more than a few at a time.
        rows = {"batch_size": 16} if IMAGE_COLUMN in columns else {}
        for batch in file.iter_batches(columns=wanted, **rows):
            for record in batch.to_pylist():
                yield record, str(path)
    except pa.ArrowException as error:
        raise TextError(f"{path} is not a readable parquet file: {error}") from error


def _checked(decode: Callable[[], str], where: str) -> str:
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

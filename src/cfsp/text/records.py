"""Records of files and of data sets, and the document in one: a text, or a conversation.

A file of plain text has no records: it is one document in pieces. A conversation is a list of
messages, of which a model's chat template makes text.
"""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.locating import hub_is_missed, is_offline, why_not_written
from cfsp.errors import MissingExtraError, TextError, first_line
from cfsp.settings import check_encodes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_COLUMN, IMAGE_COLUMN = "messages", "images"
EXPECTED = "expected .txt, .jsonl or .parquet, which datasets write by to_parquet"
Conversation = list[dict[str, Any]]

_IMAGES = ("image", "image_url")  # types of the parts of a message

# What templates call for the date of today, and the day that it is for them: Llama 3's own default.
_DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_DAY = date(2024, 7, 26)

Record = tuple[Any, str]  # a record, and where it is

_PIECE_CHARACTERS = 4096  # a text file is read in pieces of about so many characters


def document_of(record: Any, column: str, where: str) -> Any:
    """Return the document in a record, a text or a conversation, without its images."""
    if not isinstance(record, dict) or column not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise TextError(f"{where}: no column {column!r}; found: {keys}; name one as FILE:COLUMN")
    document = record[column]
    if column == CHAT_COLUMN:
        document = _messages(document, where)
        text = "".join(message["content"] for message in document)
    elif not isinstance(document, str):
        raise TextError(f"{where}: column {column!r} is {type(document).__name__}, expected text")
    else:
        text = document
    check_encodes(text, where)
    return document


def has_images(record: Any, column: str) -> bool:
    """Return whether images belong to the document in a record, which `document_of` took."""
    if record.get(IMAGE_COLUMN):
        return True
    contents = [m.get("content") for m in record[column]] if column == CHAT_COLUMN else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(part.get("type") in _IMAGES for part in parts)


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
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, number: int, **asked: bool
) -> str:
    """Return the text that the chat template makes of a conversation, whose number errors name.

    The template is asked for more by name: `add_generation_prompt` ends it with what asks for an
    answer, and without `enable_thinking` a model that thinks first answers at once. One that tells
    the date tells the same every day: what a run measures or resumes must not depend on it.
    """
    apply: Any = tokenizer.apply_chat_template

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            template = _DATE.sub(_dated, tokenizer.get_chat_template())
            text: str = apply(messages, chat_template=template, tokenize=False, **asked)
        except Exception as error:  # templates raise what they like
            raise TextError(
                f"conversation {number} does not fit the chat template: {error}"
            ) from error
        return text

    def shown(text: str) -> int:
        return sum(message["content"].strip() in text for message in conversation)

    text = render(conversation)
    if shown(text) < len(conversation):
        # Templates of some multimodal models look at the parts of a message, and see none in a
        # text; others write the text in another form, and may not know parts.
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in conversation]
        with suppress(TextError):
            return max(text, render(parts), key=shown)
    return text


def _dated(asked: re.Match[str]) -> str:
    return json.dumps(_DAY.strftime(asked[2]))


def _messages(value: Any, where: str) -> Conversation:
    """Return messages with their contents as texts, which lists of parts become."""
    found = value if isinstance(value, list) and all(isinstance(m, dict) for m in value) else None
    contents = [_content(message) for message in found or ()]
    roles = [message.get("role") for message in found or ()]
    if found is None or None in contents or not all(isinstance(role, str) for role in roles):
        raise TextError(
            f"{where}: column {CHAT_COLUMN!r} must be a list of messages, each with the texts "
            f'"role" and "content", found {str(value)[:60]}'
        )
    return [{**message, "content": text} for message, text in zip(found, contents, strict=True)]


def _content(message: dict[str, Any]) -> str | None:
    """Return the text of a message; None if it is neither a text nor parts of text and images.

    What calls tools may have none, which the APIs that chats come from write as null.
    """
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    parts = [part if isinstance(part, dict) else {} for part in content]
    texts: list[Any] = ["" if part.get("type") in _IMAGES else part.get("text") for part in parts]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


# Local files.


def is_text_file(path: Path) -> bool:
    """Return whether a path is that of a file of plain text, which is one document in pieces."""
    return path.suffix.lower() == ".txt"


def likely_column(path: Path) -> str:
    """Return the column of documents: of conversations where the first record has those alone.

    Of what cannot be read it is that of texts: reading it will say what is wrong.
    """
    columns: set[str] = set()
    with suppress(TextError, ValueError, AttributeError, OSError, ImportError):
        if not path.is_file():
            return "text"
        if path.suffix.lower() == ".parquet":
            import pyarrow.parquet as pq

            columns = set(pq.read_schema(path).names)
        elif path.suffix.lower() == ".jsonl":
            record, _ = next(_json_lines(path), ({}, ""))
            has = {name for name, value in record.items() if value is not None}
            columns = has | ({CHAT_COLUMN} & record.keys())
    return CHAT_COLUMN if CHAT_COLUMN in columns and "text" not in columns else "text"


def local_records(path: Path, column: str) -> Iterator[Record]:
    """Return the records of a file that exists, which needs that column."""
    if path.suffix.lower() == ".jsonl":
        return _json_lines(path)
    if path.suffix.lower() == ".parquet":
        return _parquet(path, column)
    raise TextError(f"{path} has an unknown ending; {EXPECTED}")


def text_file(path: Path) -> Iterator[str]:
    """Yield a text in pieces that end with a line and follow one another."""
    held = ""
    for number, line in enumerate(_lines(path), start=1):
        text = _decoded(line, f"{path}, line {number}")
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
            record = json.loads(_decoded(line, where))
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


def _parquet(path: Path, column: str) -> Iterator[Record]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("reading a .parquet file", "data") from error
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if column not in names:
            raise TextError(
                f"{path} has no column {column!r}; it has: {', '.join(names)}; name one as "
                "FILE:COLUMN"
            )
        images = {IMAGE_COLUMN: True} if IMAGE_COLUMN in names else {}  # large, and not read
        for batch in file.iter_batches(columns=[column]):
            for record in batch.to_pylist():
                yield images | record, str(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise TextError(f"{path} is not a readable parquet file: {error}") from error


def _decoded(line: bytes, where: str) -> str:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise TextError(
            f"{where} is not UTF-8 text: byte {error.start} is not valid; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise TextError(f"{where} is binary: it holds NUL characters; save it as UTF-8 text")
    return text


# Data sets on the hub, read as a stream.


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
        if getattr(data, "features", None):
            data = data.decode(False)  # images stay bytes, which need no Pillow
        for record in data:
            yield record, hub_id
    except ImportError as error:  # of what the data set is stored in
        raise TextError(f"{hub_id} cannot be read: {first_line(error)}") from error
    except Exception as error:  # network, hub and parsing errors of many types
        if why := why_not_written(error):
            raise TextError(f"{hub_id} cannot be read: {why}") from error
        if is_offline():
            raise TextError(
                f"HF_HUB_OFFLINE is set, and the cache of datasets has no copy of {hub_id} "
                f"({config}, {split}) to read ({type(error).__name__}); load it once by "
                "datasets.load_dataset where there is a network, or give a local file or mixed"
            ) from error
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

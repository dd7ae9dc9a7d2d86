"""What a record of a file or data set holds in a column: a text, or a conversation."""

from __future__ import annotations

from typing import Any

from cfsp.errors import TextError
from cfsp.text.chats import CHAT_COLUMN, checked_conversation

IMAGE_COLUMN = "images"


def value_of(record: Any, column: str, where: str) -> Any:
    """Return what a record has in a column, or raise TextError: there is no such column."""
    if not isinstance(record, dict) or column not in record:
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise TextError(f"{where}: no column {column!r}; found: {keys}")
    return record[column]


def document_of(record: Any, column: str, where: str, *, beside_images: bool = False) -> Any:
    """Return the document in a record: text, or a conversation in the column `messages`.

    Args:
        record: a dictionary by columns.
        column: of the document.
        where: file and line, for errors.
        beside_images: whether there is a column of images, of which nothing is taken.

    Raises:
        TextError: there is none.
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

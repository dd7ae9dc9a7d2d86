"""Images beside conversations: what a data set has in its column `images`, and reading a picture.

An image is a path, relative to the file that names it; or {"bytes", "path"}, as parquet files and
data sets store it; or a picture of Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfsp.errors import MissingExtraError, TextError
from cfsp.text.chats import CHAT_COLUMN, Conversation, checked_messages
from cfsp.text.records import IMAGE_COLUMN, value_of


@dataclass(frozen=True)
class Sample:
    """A conversation, and the images that belong to it."""

    messages: Conversation  # contents are lists of parts
    images: tuple[Any, ...]  # paths, bytes or pictures, in the order of their places
    where: str  # file and line, for errors


def sample_of(record: Any, where: str, directory: Path | None) -> Sample:
    """Return what a record has in its columns of messages and of images.

    Paths of images are relative to `directory`; where it is None, images are no paths.
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


def open_image(value: Any, where: str) -> Any:
    """Return a picture of Pillow, in RGB, of a path, bytes or a picture."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError("reading images", "images") from error
    if hasattr(value, "convert"):
        return value.convert("RGB")
    named = value if isinstance(value, Path) else f"of {len(value)} bytes"
    try:
        with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as picture:
            return picture.convert("RGB")
    except FileNotFoundError as error:
        raise TextError(
            f"{where}: there is no image {named}; paths are relative to the file that names them"
        ) from error
    except Exception as error:  # Pillow raises many types for what is no picture
        raise TextError(
            f"{where}: image {named} cannot be read ({type(error).__name__}: {error})"
        ) from error

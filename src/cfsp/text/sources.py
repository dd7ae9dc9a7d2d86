"""What `--data` and `--eval` take: names of texts, and texts themselves.

    mixed                        text of nine kinds that comes with this package; the default
    mixed/KIND                   one of them (`cfsp.text.mixed`)
    python-docs                  Python's own reference prose, in every CPython
    python-source                source code of the standard library, in every CPython
    wikitext2, c4                the usual data sets, from the hub
    NAME:CONFIG:SPLIT:COLUMN     any other data set on the hub
    PATH.txt, .jsonl, .parquet   local files (PATH:COLUMN for another column than `text`)
    DIRECTORY                    written by `datasets.Dataset.save_to_disk`
    Text(name, documents)        in Python: the text itself

The column `messages` holds conversations: lists of {"role", "content"}, which become text by the
model's chat template. Of a local file it need not be named where there is no `text`.

The column `images` beside it, or beside a text, holds the images that belong there; a multimodal
model is calibrated on both (`cfsp.text.image_windows`). Everything else reads the text alone, and
says so.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import GONE, TextError
from cfsp.settings import Text
from cfsp.text.chats import CHAT_COLUMN, Conversation, conversation_texts
from cfsp.text.files import column_names, is_text_file, local_documents, local_samples
from cfsp.text.hub import hub_documents, hub_has_images, hub_samples
from cfsp.text.images import IMAGE_COLUMN, Sample
from cfsp.text.mixed import MIXED, Purpose, mixed_texts
from cfsp.text.offline import python_docs, python_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What is longer and no file is taken for the text itself.
_LONGEST_NAME = 200

_OFFLINE: dict[str, Callable[[Purpose], Iterator[str]]] = {
    **mixed_texts(),
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
    """A stream of documents.

    Attributes:
        text: what the user called it, or the text itself.
        purpose: what it is read for; sources with several parts give disjoint ones.
    """

    text: str | Text
    purpose: Purpose

    @property
    def name(self) -> str:
        """What the user called it."""
        return name_of(self.text)

    @property
    def is_chat(self) -> bool:
        """Whether the source holds conversations instead of documents."""
        if isinstance(self.text, Text):
            return False
        return _split_column(self.text)[1] == CHAT_COLUMN or self.text.endswith(f":{CHAT_COLUMN}")

    @property
    def has_evaluation_part(self) -> bool:
        """Whether nothing is calibrated or trained on of what is measured on."""
        return self.text in _OFFLINE or self.text in _HUB

    @property
    def on_hub(self) -> bool:
        """Whether the source is read from the hub, and may have no end."""
        return isinstance(self.text, str) and _hub_place(self.text, self.purpose) is not None

    @property
    def separator(self) -> str:
        """What stands between two documents.

        Nothing between conversations, where the template writes it, and pieces of one text.
        """
        text = self.text
        is_file = isinstance(text, str) and text not in _OFFLINE and not self.on_hub
        in_pieces = is_file and is_text_file(_split_column(str(text))[0])
        return "" if in_pieces or self.is_chat else "\n\n"

    @property
    def has_images(self) -> bool:
        """Whether the source has a column of images.

        Raises:
            TextError: the source is on the hub, which does not serve it.
            MissingExtraError: it needs the package datasets.
        """
        text = self.text
        if isinstance(text, Text) or text in _OFFLINE or text in _HUB:
            return False
        if (on_hub := _hub_place(text, self.purpose)) is not None:
            return hub_has_images(*on_hub[:3])
        return IMAGE_COLUMN in column_names(_split_column(text)[0])

    def samples(self) -> Iterator[Sample]:
        """Yield the texts or conversations with the images beside them, in the source's own order.

        Raises:
            TextError: a record is neither, or its images are none.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        assert self.has_images and isinstance(self.text, str), self.name
        if (on_hub := _hub_place(self.text, self.purpose)) is not None:
            return hub_samples(*on_hub)
        return local_samples(*_split_column(self.text))

    def documents(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
        """Yield the documents, in the source's own order.

        Args:
            tokenizer: its chat template makes conversations into text; needed for these only.

        Raises:
            TextError: the source does not exist or is not readable as text.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        if not self.is_chat:
            self._tell_of_images()
            return self._values()
        if tokenizer is None:
            raise TextError(
                f"{self.name} holds conversations, which need a model's chat template; give "
                "plain text here"
            )
        return conversation_texts(self.conversations(), tokenizer)

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations of a chat source, in its own order.

        Raises:
            TextError: the source does not exist or a record is not a conversation.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        assert self.is_chat, self.name
        self._tell_of_images()
        return self._values()

    def _tell_of_images(self) -> None:
        if self.has_images:
            logger.warning(
                "%s: its images are left out here, only its text is read (images are read to "
                "calibrate a multimodal model)",
                self.name,
            )

    def open(self) -> None:
        """Read the beginning, and nothing else.

        Raises:
            TextError: the source does not exist or is not readable as text.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        next(self._values(), None)

    def _values(self) -> Iterator[Any]:
        text = self.text
        if isinstance(text, Text):
            return iter(text.documents)
        if text in _OFFLINE:
            return _OFFLINE[text](self.purpose)
        if (on_hub := _hub_place(text, self.purpose)) is not None:
            return hub_documents(*on_hub)
        path, column = _split_column(text)
        if _exists(path):
            return local_documents(path, column)
        raise TextError(_not_found(text))


def name_of(text: str | Text) -> str:
    """Return what a text is called."""
    return text.name if isinstance(text, Text) else text


def identity_of(text: str | Text) -> object:
    """Return what is the same for all names of a text: for paths to one column of one file."""
    if isinstance(text, Text) or text in _OFFLINE:
        return text
    path, column = _split_column(text)
    return _hub_place(text, "calibration") or (path.resolve(), column)


def check_texts(texts: Sequence[str | Text], purpose: Purpose) -> None:
    """Open every text and read its beginning, before any work is done on the others.

    Args:
        texts: names, or texts themselves.
        purpose: what they are read for.

    Raises:
        TextError: one does not exist or is not readable as text.
        MissingExtraError: one needs the package datasets or pyarrow.
    """
    for text in texts:
        if isinstance(text, str) and _hub_place(text, purpose) is not None:
            _open_on_hub(text, purpose)
        else:
            TextSource(text, purpose).open()


@cache
def _open_on_hub(text: str, purpose: Purpose) -> None:
    """Open a text that takes seconds to open; once, however often it is asked for."""
    TextSource(text, purpose).open()


def _hub_place(text: str, purpose: Purpose) -> tuple[str, str, str, str] | None:
    """Return hub id, config, split and column of a text on the hub; None for another text."""
    if text in _HUB:
        hub_id, config, splits, column = _HUB[text]
        return hub_id, config, splits[purpose], column
    if text in _OFFLINE or _exists(_split_column(text)[0]):
        return None
    parts = text.split(":")
    return (parts[0], parts[1], parts[2], parts[3]) if len(parts) == 4 else None


def _not_found(name: str) -> str:
    known = [*_OFFLINE, *_HUB]
    shown = [each for each in known if not each.startswith(f"{MIXED}/")]
    path = _split_column(name)[0]
    files = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(name, known, n=1)
    near += [str(path.with_name(file)) for file in difflib.get_close_matches(path.name, files, n=1)]
    meant = f" did you mean {near[0]}?" if near else ""
    meant = f" {GONE[name]};" if name in GONE else meant
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}..."
        meant = " a text itself is Text(name, documents) in Python;"
    return (
        f"{name} is neither a file nor a known text;{meant} known are: {', '.join(shown)}, "
        f"{MIXED}/KIND, or NAME:CONFIG:SPLIT:COLUMN on the hub"
    )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # longer than a name can be: a text itself
        return False


def _split_column(name: str) -> tuple[Path, str]:
    path = Path(name).expanduser()
    if not _exists(path) and ":" in name:
        before, column = name.rsplit(":", 1)
        if _exists(Path(before).expanduser()):
            return Path(before).expanduser(), column
    # Where there are conversations and no text.
    columns = column_names(path, lines=1)
    return path, CHAT_COLUMN if CHAT_COLUMN in columns and "text" not in columns else "text"

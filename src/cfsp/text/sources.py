"""What `--data` and `--eval` take: names of texts, and texts themselves.

    mixed                        text of nine kinds that comes with this package; the default
    mixed/KIND                   one of them (`cfsp.text.offline`)
    python-docs                  Python's own reference prose, in every CPython
    python-source                source code of the standard library, in every CPython
    wikitext2, c4                the usual data sets, from the hub
    NAME:CONFIG:SPLIT:COLUMN     any other data set on the hub
    PATH.txt, .jsonl, .parquet   local files (PATH:COLUMN for another column than `text`)
    Text(name, documents)        in Python: the text itself

The column `messages` holds conversations: lists of {"role", "content"}, which become text by the
model's chat template. Of a local file it need not be named where there is no `text`.

Only text is read: images in messages, or in a column `images`, are left out, and that is said.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.locating import exists, path_of
from cfsp.errors import TextError
from cfsp.settings import Text
from cfsp.settings.text import check_encodes
from cfsp.text.offline import MIXED, OFFLINE, Purpose
from cfsp.text.records import (
    CHAT_COLUMN,
    EXPECTED,
    Record,
    conversation_texts,
    document_of,
    has_images,
    hub_records,
    is_text_file,
    likely_column,
    local_records,
    text_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_LONGEST_NAME = 200  # what is longer and no file is taken for the text itself

_Place = Path | tuple[str, str, str]  # hub id, config and split, or a local path

# Short name -> hub id, config, split to measure on; calibration reads "train".
_HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "c4": ("allenai/c4", "en", "validation"),
}


@dataclass(frozen=True)
class TextSource:
    """A stream of documents."""

    text: str | Text  # what the user called it, or the text itself
    purpose: Purpose  # sources with several parts give disjoint ones

    @property
    def name(self) -> str:
        """What the user called it."""
        return name_of(self.text)

    @cached_property
    def place(self) -> tuple[_Place | None, str]:
        """Where its records are, None for no file and no hub, and the column of documents."""
        text = self.text
        if isinstance(text, Text) or text in OFFLINE:
            return None, "text"
        check_encodes(text, f"the name {text!r}")
        if text in _HUB:
            hub_id, config, split = _HUB[text]
            return (hub_id, config, "train" if self.purpose == "calibration" else split), "text"
        path, column = _split_column(text)
        parts = text.split(":")
        if len(parts) == 4 and not exists(path):
            return (parts[0], parts[1], parts[2]), parts[3]
        return path, column

    @property
    def is_chat(self) -> bool:
        """Whether the source holds conversations instead of documents."""
        return self.place[1] == CHAT_COLUMN

    @property
    def has_evaluation_part(self) -> bool:
        """Whether nothing is calibrated or trained on of what is measured on."""
        return self.text in OFFLINE or self.text in _HUB

    @property
    def on_hub(self) -> bool:
        """Whether the source is read from the hub, and may have no end."""
        return isinstance(self.place[0], tuple)

    @property
    def separator(self) -> str:
        """What stands between two documents, unless a template or the text itself writes it."""
        return "" if self.is_in_pieces or self.is_chat else "\n\n"

    @property
    def is_in_pieces(self) -> bool:
        """Whether what it yields are not documents, but pieces of one that follow one another."""
        where = self.place[0]
        return isinstance(where, Path) and is_text_file(where)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
        """Yield the documents; of conversations the text that the chat template makes."""
        documents = self.documents()
        return conversation_texts(documents, tokenizer) if self.is_chat else documents

    def open(self) -> None:
        """Read the beginning, and nothing else."""
        next(self.documents(), None)

    def documents(self) -> Iterator[Any]:
        """Yield the documents, which are conversations in a chat source, in its own order."""
        if isinstance(self.text, Text):
            return iter(self.text.documents)
        if self.text in OFFLINE:
            return OFFLINE[self.text](self.purpose)
        where, column = self.place
        if not isinstance(where, Path):
            assert where is not None, self.name
            return self._of_records(hub_records(*where))
        if not exists(where):
            raise TextError(_not_found(self.name))
        if not where.is_file():  # a text is read more than once, and not from its beginning only
            raise TextError(f"{where} is a directory or a pipe; {EXPECTED}")
        if is_text_file(where):
            if column != "text":
                raise TextError(f"{where} is plain text, which has no column {column!r}")
            return text_file(where)
        return self._of_records(local_records(where, column))

    def _of_records(self, records: Iterator[Record]) -> Iterator[Any]:
        column = self.place[1]
        for record, where in records:
            document = document_of(record, column, where)
            if has_images(record, column):
                _tell_of_images(self.name)
            yield document


@cache
def _tell_of_images(name: str) -> None:
    """Say once of each text that it is read without its images."""
    logger.warning("%s: its images are left out, only its text is read", name)


# What takes seconds to open is opened once, however often it is asked for.
_open_on_hub = cache(TextSource.open)


def name_of(text: str | Text) -> str:
    """Return what a text is called."""
    return text.name if isinstance(text, Text) else text


def identity_of(text: str | Text, purpose: Purpose = "calibration") -> object:
    """Return what is the same for all names of a text: for paths to one column of one file."""
    where, column = TextSource(text, purpose).place
    if where is None:
        return text
    return (where.resolve() if isinstance(where, Path) else where), column


def check_texts(
    calibration: Sequence[str | Text] | None = None, evaluation: Sequence[str | Text] | None = None
) -> None:
    """Open every text and read its beginning, before anything that is slow."""
    sources = [TextSource(text, "calibration") for text in calibration or ()]
    for source in (*sources, *(TextSource(text, "evaluation") for text in evaluation or ())):
        if source.on_hub:
            _open_on_hub(source)
        else:
            source.open()


def _not_found(name: str) -> str:
    known = [*OFFLINE, *_HUB]
    shown = [each for each in known if not each.startswith(f"{MIXED}/")]
    path = _split_column(name)[0]
    files: list[str] = []
    with suppress(OSError, ValueError):  # there is no such directory, or nobody may list it
        files = [file.name for file in path.parent.iterdir() if exists(file)]
    near = difflib.get_close_matches(name, known, n=1)
    near += [str(path.with_name(file)) for file in difflib.get_close_matches(path.name, files, n=1)]
    meant = f" did you mean {near[0]}?" if near else ""
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}..."
        meant = " a text itself is Text(name, documents) in Python;"
    return (
        f"{name} is neither a file nor a known text;{meant} known are: {', '.join(shown)}, "
        f"{MIXED}/KIND, or NAME:CONFIG:SPLIT:COLUMN on the hub"
    )


def _split_column(name: str) -> tuple[Path, str]:
    path = path_of(name)
    if not exists(path) and ":" in name:
        before, column = name.rsplit(":", 1)
        if exists(path_of(before)):
            return path_of(before), column
    return path, likely_column(path)

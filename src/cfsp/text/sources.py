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

and, to calibrate on, `self`: text that the model writes (`cfsp.whole_model.own_text`).

The column `messages` holds conversations: lists of {"role", "content"}, which become text by the
model's chat template. Of a local file it need not be named where there is no `text`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.errors import TextError
from cfsp.settings import OWN_TEXT, Text
from cfsp.text.chats import CHAT_COLUMN, Conversation, conversation_texts
from cfsp.text.files import local_documents
from cfsp.text.hub import hub_documents
from cfsp.text.mixed import MIXED, Purpose, mixed_texts
from cfsp.text.offline import python_docs, python_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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

    def documents(self, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[str]:
        """Yield the documents, in the source's own order.

        Args:
            tokenizer: its chat template makes conversations into text; needed for these only.

        Raises:
            TextError: the source does not exist or is not readable as text.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        if self.is_chat:
            if tokenizer is None:
                raise TextError(
                    f"{self.name} holds conversations, which need a model's chat template; give "
                    "plain text here"
                )
            return conversation_texts(self.conversations(), tokenizer)
        return self._values()

    def conversations(self) -> Iterator[Conversation]:
        """Yield the conversations of a chat source, in its own order.

        Raises:
            TextError: the source does not exist or a record is not a conversation.
            MissingExtraError: it needs the package datasets or pyarrow.
        """
        assert self.is_chat, self.name
        return self._values()

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
        if path.exists():
            return local_documents(path, column)
        raise TextError(_not_found(text))


def name_of(text: str | Text) -> str:
    """Return what a text is called."""
    return text.name if isinstance(text, Text) else text


def check_texts(texts: Sequence[str | Text], purpose: Purpose) -> None:
    """Open every text and read its beginning, before any work is done on the others.

    Args:
        texts: names, or texts themselves; `self`, which is not there yet, is left out.
        purpose: what they are read for.

    Raises:
        TextError: one does not exist or is not readable as text.
        MissingExtraError: one needs the package datasets or pyarrow.
    """
    for text in texts:
        if text == OWN_TEXT and purpose == "calibration":
            continue
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
    if text in _OFFLINE or _split_column(text)[0].exists():
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
    return (
        f"{name} is neither a file nor a known text;{meant} known are: {', '.join(shown)}, or "
        "NAME:CONFIG:SPLIT:COLUMN on the hub"
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

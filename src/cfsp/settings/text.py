"""What is read, to calibrate on and to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cfsp.errors import TextError, UsageError
from cfsp.settings.options import (
    Declared,
    advanced_option,
    number_or_all,
    one_or_several,
    option,
)

LONGEST_WINDOW = 1 << 24
MOST_WINDOWS = 1 << 32

DEFAULT_TEXT = "mixed"
DEFAULT_SAMPLES = 128
DEFAULT_SEQLEN = 1024
DEFAULT_QUESTIONS = 100  # that models are asked

# Whether windows begin with BOS: as the tokenizer begins an input, always, never.
Bos = Literal["auto", "yes", "no"]
BOS: tuple[Bos, ...] = get_args(Bos)
BOS_HELP = "whether windows begin with BOS; auto: as the model's own tokenizer begins an input"


@dataclass(frozen=True)
class Text:
    """A text itself, where otherwise the name of one is given.

    Attributes:
        name: what manifests and tables call it.
        documents: one string, or several.

    Raises:
        TextError: there is no text in it.
    """

    name: str
    documents: Sequence[str]

    def __post_init__(self) -> None:
        # A generator can be read once; of columns of a data set only their names would be.
        documents = one_or_several(self.documents)
        are_strings = all(isinstance(part, str) for part in (self.name, *documents))
        if not self.name or not are_strings or isinstance(self.documents, Mapping):
            raise TextError(
                f"Text(name, documents) needs a name and strings, found {self.name!r} and "
                f"{str(self.documents)[:60]!r}"
            )
        if f"{self.name}/".startswith(f"{DEFAULT_TEXT}/"):
            raise TextError(f"{self.name!r} is the name of a text of cfsp; call yours otherwise")
        if not any(document.strip() for document in documents):
            raise TextError(f"the text {self.name!r} is empty")
        for part in (self.name, *documents):
            check_encodes(part, f"the text {self.name!r}")
        object.__setattr__(self, "documents", documents)


def check_encodes(text: str, where: str) -> None:
    """Check that a text has no half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"{where}: half of a surrogate pair at character {error.start}, which is no text; "
            "leave it out (a name of a file that is no UTF-8 has one: call it otherwise)"
        ) from error


# One text or several: names, or texts themselves.
Data = str | Path | Text | Sequence[str | Path | Text]


def texts_of(data: Data | None) -> tuple[str | Text, ...]:
    """Return the names and texts that are given as one, several or none, each with its own name."""
    given = () if data is None else one_or_several(data)
    texts = tuple(text if isinstance(text, Text) else str(text) for text in given)
    named: dict[str, str | Text] = {}
    for text in texts:
        name = text.name if isinstance(text, Text) else text
        if named.setdefault(name, text) != text:
            raise UsageError(f"two texts are called {name!r}; give each a name of its own")
    return texts


@dataclass(frozen=True)
class CalibrationText(Declared):
    """Which text to calibrate on; see `cfsp.text.drawing.draw_text`."""

    names: tuple[str | Text, ...] = option(
        (DEFAULT_TEXT,),
        "text to calibrate on: a .txt, .jsonl or .parquet file, wikitext2, c4, a hub data set "
        "(NAME:CONFIG:SPLIT:COLUMN); repeatable",
        kind=texts_of,
        flag="data",
        metavar="TEXT",
        default=DEFAULT_TEXT,
        repeats=True,
    )
    samples: int | None = advanced_option(
        None,
        "windows of text in all",
        kind=int,
        least=1,
        most=MOST_WINDOWS,
        default="128, or all there are",
    )
    seqlen: int = advanced_option(
        DEFAULT_SEQLEN, "tokens in a window", kind=int, least=2, most=LONGEST_WINDOW, metavar="T"
    )
    seed: int = advanced_option(0, "of the draw of windows", kind=int, least=0, most=(1 << 63) - 1)
    bos: Bos = advanced_option("auto", BOS_HELP, choices=BOS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names:
            raise UsageError(
                "there is no text to calibrate on; give one or several: wikitext2, c4, "
                "mixed, a .txt, .jsonl or .parquet file, or Text(name, documents)"
            )

    @property
    def windows(self) -> int:
        """How many are drawn, where there are so many."""
        return DEFAULT_SAMPLES if self.samples is None else self.samples


@dataclass(frozen=True)
class EvaluationText(Declared):
    """Which texts to measure perplexity on: the first windows of each, or all for None."""

    names: tuple[str | Text, ...] = option(
        (),
        "text to measure perplexity on, before and after; repeatable",
        kind=texts_of,
        flag="eval",
        metavar="TEXT",
        repeats=True,
    )
    windows: int | None = advanced_option(
        12, "first N windows of each text, or all", kind=number_or_all, least=1, metavar="N"
    )
    seqlen: int | None = option(
        None,
        "tokens in a window, BOS included",
        kind=int,
        least=2,
        most=LONGEST_WINDOW,
        metavar="T",
        default="1024, or what the models can read if that is less",
    )
    bos: Bos = option("auto", BOS_HELP, choices=BOS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.names and self.windows not in (None, EvaluationText.windows):
            raise UsageError(
                f"windows={self.windows} are of each text to measure perplexity on, found no text; "
                "name one"
            )

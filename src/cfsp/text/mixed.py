"""The mixed text: documents of many kinds under free licences, which travel with the package.

    mixed          all kinds, as evenly as possible
    mixed/KIND     one kind: encyclopaedia, web, books, forum, code, mathematics, languages, chat
                   or structured (data, configuration, markup)

A kind is a file `mixture/KIND.jsonl.gz`, one document a line: its text, title, author, source and
licence. `mixture/SOURCES.md` lists them, and `docs/text.md` tells how they were collected. What is
evaluated on is never calibrated on: the last fifth of each kind is for evaluation.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from cfsp.errors import TextError

MIXED = "mixed"
# Few windows go to the first kinds.
KINDS = (
    "encyclopaedia",
    "web",
    "code",
    "languages",
    "forum",
    "mathematics",
    "books",
    "chat",
    "structured",
)

# One document of this many is for evaluation.
_EVALUATION_SHARE = 5
_DIRECTORY = Path(__file__).with_name("mixture")

Purpose = Literal["calibration", "evaluation"]


def parts_of(name: str) -> tuple[str, ...]:
    """Return the texts that windows of a text are drawn from: each kind, for the mixed text."""
    return tuple(f"{MIXED}/{kind}" for kind in KINDS) if name == MIXED else (name,)


def comes_with_cfsp(name: str) -> bool:
    """Return whether a text is the mixed one or a kind of it, and not the user's own."""
    return name == MIXED or name.startswith(f"{MIXED}/")


def mixed_texts() -> dict[str, Callable[[Purpose], Iterator[str]]]:
    """Return what reads the mixed text and each of its kinds, by name."""
    kinds = {f"{MIXED}/{kind}": partial(kind_documents, kind) for kind in KINDS}
    return {MIXED: mixed_documents, **kinds}


def kind_documents(kind: str, purpose: Purpose) -> Iterator[str]:
    """Yield the documents of one kind that are for a purpose.

    Raises:
        TextError: the package was installed without its text.
    """
    documents = [record["text"] for record in records(kind)]
    split = len(documents) - len(documents) // _EVALUATION_SHARE
    return iter(documents[:split] if purpose == "calibration" else documents[split:])


def mixed_documents(purpose: Purpose) -> Iterator[str]:
    """Yield documents of all kinds by turns, so that each has given equally much at any time.

    Raises:
        TextError: the package was installed without its text.
    """
    left = {kind: kind_documents(kind, purpose) for kind in KINDS}
    given = dict.fromkeys(KINDS, 0)
    while left:
        kind = min(left, key=given.__getitem__)
        document = next(left[kind], None)
        if document is None:
            del left[kind]
            continue
        given[kind] += len(document)
        yield document


def records(kind: str) -> Iterator[dict[str, str]]:
    """Yield each document of a kind with its title, author, source and licence.

    Raises:
        TextError: the package was installed without its text.
    """
    path = _DIRECTORY / f"{kind}.jsonl.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).split(b"\n")
    except OSError as error:
        raise TextError(
            f"cannot read {path}, which is part of this package ({error}); install it again, or "
            "give a text file"
        ) from error
    return (json.loads(line) for line in lines if line)

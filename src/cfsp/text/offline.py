"""Texts that need no hub: the mixed text, which travels with the package, and Python's own.

    mixed          documents of many kinds under free licences, as evenly as possible
    mixed/KIND     one kind of them
    python-docs    reference prose, and python-source code, that every CPython carries

A kind of the mixed text is a file `mixture/KIND.jsonl.gz`, one document a line: its text, title,
author, source and licence. `mixture/SOURCES.md` lists them, and `docs/text.md` tells how they were
collected. What is evaluated on is never calibrated on.
"""

from __future__ import annotations

import gzip
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from cfsp.errors import TextError

Purpose = Literal["calibration", "evaluation"]

MIXED = "mixed"
# Few windows go to the first kinds.
KINDS = (
    "encyclopaedia", "web", "code", "languages", "forum", "mathematics", "books", "chat",
    "structured",
)  # fmt: skip

_DIRECTORY = Path(__file__).with_name("mixture")
# For evaluation are the last fifth of each kind, and every fourth of Python's documents.
_EVALUATION_SHARE = 5
_EVALUATION_STRIDE = 4
_PARAGRAPH = "\n\n"

# Pure-Python modules that every CPython from 3.11 on ships.
_SOURCE_MODULES = (
    "argparse", "ast", "bisect", "calendar", "codecs", "configparser", "copy", "csv", "datetime",
    "difflib", "dis", "enum", "fractions", "functools", "gettext", "heapq", "inspect", "ipaddress",
    "mailbox", "optparse", "pickle", "random", "shutil", "statistics", "subprocess", "tarfile",
    "textwrap", "threading", "tokenize", "typing", "uuid", "zipapp",
)  # fmt: skip


def parts_of(name: str) -> tuple[str, ...]:
    """Return the texts that windows of a text are drawn from: each kind, for the mixed text."""
    return tuple(f"{MIXED}/{kind}" for kind in KINDS) if name == MIXED else (name,)


def comes_with_cfsp(name: str) -> bool:
    """Return whether a text is the mixed one or a kind of it, and not the user's own."""
    return name == MIXED or name.startswith(f"{MIXED}/")


def kind_documents(kind: str, purpose: Purpose) -> Iterator[str]:
    """Yield the documents of one kind of the mixed text that are for a purpose."""
    documents = [record["text"] for record in records(kind)]
    split = len(documents) - len(documents) // _EVALUATION_SHARE
    return iter(documents[:split] if purpose == "calibration" else documents[split:])


def _mixed_documents(purpose: Purpose) -> Iterator[str]:
    """Yield documents of all kinds by turns, so that each has given equally much at any time."""
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
    """Yield each document of a kind with its title, author, source and licence."""
    path = _DIRECTORY / f"{kind}.jsonl.gz"
    try:
        lines = gzip.decompress(path.read_bytes()).split(b"\n")
    except OSError as error:
        raise TextError(
            f"cannot read {path}, which is part of this package ({error}); install it again, or "
            "give a text file"
        ) from error
    return (json.loads(line) for line in lines if line)


def _python_docs(purpose: Purpose) -> Iterator[str]:
    """Yield Python's reference topics (about 465 KB of English prose)."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError("this Python was built without pydoc_data; give a text file") from error
    # Topics hold others whole: what is evaluated on is left out where it comes again.
    parts = partial(_part, [topics[name] for name in sorted(topics)])
    if purpose == "evaluation":
        return parts(purpose)
    evaluated = {each for topic in parts("evaluation") for each in topic.split(_PARAGRAPH)}
    left = (
        _PARAGRAPH.join(each for each in topic.split(_PARAGRAPH) if each not in evaluated)
        for topic in parts(purpose)
    )
    return filter(None, left)


def _python_source(purpose: Purpose) -> Iterator[str]:
    """Yield the source code of standard-library modules (about 1.5 MB)."""
    directory = Path(sysconfig.get_path("stdlib"))
    files = [directory / f"{name}.py" for name in _SOURCE_MODULES]
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
    if not texts:
        raise TextError(f"{directory} holds no source of the standard library; give a text file")
    return _part(texts, purpose)


def _part(documents: Sequence[str], purpose: Purpose) -> Iterator[str]:
    for number, document in enumerate(documents, start=1):
        if (number % _EVALUATION_STRIDE == 0) == (purpose == "evaluation"):
            yield document


OFFLINE: dict[str, Callable[[Purpose], Iterator[str]]] = {
    MIXED: _mixed_documents,
    **{f"{MIXED}/{kind}": partial(kind_documents, kind) for kind in KINDS},
    "python-docs": _python_docs,
    "python-source": _python_source,
}

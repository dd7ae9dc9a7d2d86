"""Texts that every CPython carries, for machines that reach no hub.

Both are split into disjoint parts: what is evaluated on is never calibrated on.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from cfsp.errors import TextError

# Every fourth document is for evaluation.
_EVALUATION_STRIDE = 4

# Pure-Python modules that every CPython from 3.11 on ships.
_SOURCE_MODULES = (
    "argparse", "ast", "bisect", "calendar", "codecs", "configparser", "copy", "csv", "datetime",
    "difflib", "dis", "enum", "fractions", "functools", "gettext", "heapq", "inspect", "ipaddress",
    "mailbox", "optparse", "pickle", "random", "shutil", "statistics", "subprocess", "tarfile",
    "textwrap", "threading", "tokenize", "typing", "uuid", "zipapp",
)  # fmt: skip


def python_docs(purpose: Literal["calibration", "evaluation"]) -> Iterator[str]:
    """Yield Python's reference topics (about 465 KB of English prose)."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise TextError("this Python was built without pydoc_data; give a text file") from error
    return iter(_part([topics[name] for name in sorted(topics)], purpose))


def python_source(purpose: Literal["calibration", "evaluation"]) -> Iterator[str]:
    """Yield the source code of standard-library modules (about 1.5 MB)."""
    directory = Path(sysconfig.get_path("stdlib"))
    files = [directory / f"{name}.py" for name in _SOURCE_MODULES]
    texts = [path.read_text(encoding="utf-8") for path in files if path.is_file()]
    if not texts:
        raise TextError(f"{directory} holds no source of the standard library; give a text file")
    return iter(_part(texts, purpose))


def _part(documents: Sequence[str], purpose: Literal["calibration", "evaluation"]) -> Sequence[str]:
    if purpose == "evaluation":
        return documents[_EVALUATION_STRIDE - 1 :: _EVALUATION_STRIDE]
    return [d for i, d in enumerate(documents, start=1) if i % _EVALUATION_STRIDE]

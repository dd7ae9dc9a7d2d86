"""How far long work is: a bar on a terminal, elsewhere a plain line now and then."""

from __future__ import annotations

import io
import logging
import re
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from time import monotonic
from typing import Any, TextIO

from tqdm import tqdm

from cfsp.processes import is_first_process

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0
# Shorter work says nothing.
_QUIET_SECONDS = 10.0
_DIRECTORIES = re.compile(r"\S*/(?=[^\s/])")


class _Lines:
    """A file for bars where there is no terminal; what they write becomes a line now and then.

    All bars share one, so that work within work does not speak more often.
    """

    def __init__(self) -> None:
        self._last = monotonic()

    def write(self, text: str) -> None:
        """Pass a bar on as one message, unless the last one was a moment ago."""
        line = text.strip()
        if line and monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = monotonic()
            logger.info(line)

    def flush(self) -> None:
        """Do nothing: a message is out when it is written."""


_LINES = _Lines()


class _BarsAsLines(io.StringIO):
    """Standard error for a library: its bars become lines now and then, all else is dropped."""

    def __init__(self) -> None:
        super().__init__()
        self._begin, self.shown = monotonic(), own_stderr()

    def write(self, text: str) -> int:
        """Pass on a bar, which goes back to the beginning of its line."""
        is_long = monotonic() - self._begin >= _QUIET_SECONDS
        if text.startswith("\r") and is_long and is_first_process():
            _LINES.write(text)
        return len(text)


def own_stderr() -> TextIO:
    """Return where cfsp speaks: standard error, also while a library has another in its place."""
    return sys.stderr.shown if isinstance(sys.stderr, _BarsAsLines) else sys.stderr


def item_progress(label: str, total: int, unit: str, **options: Any) -> tqdm:  # type: ignore[type-arg]
    """Return a bar over items of a named unit; of several processes only the first shows it.

    The label may name models and texts by their paths, of which the last part is shown.
    """
    label = _DIRECTORIES.sub("", label)
    if not sys.stderr.isatty():
        options |= {
            "file": _LINES,
            "bar_format": "{desc}: {percentage:.0f}%{postfix}, {remaining} left",
            "delay": _QUIET_SECONDS,
            "position": 0,  # tqdm would move the cursor for a second bar
        }
    # By all of the work so far: after a solve, in which no token passes, hours would be left.
    options |= {"smoothing": 0, "disable": not is_first_process(), "leave": False}
    return tqdm(desc=label, total=total, unit=unit, **options)


def library_progress() -> AbstractContextManager[object]:
    """Let a library show its own bars, where there is no terminal as lines now and then.

    Errors are raised as exceptions and pass.
    """
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(_BarsAsLines())

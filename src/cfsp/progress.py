"""Progress bars for long work; they stay quiet when standard error is not a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from tqdm import tqdm

from cfsp.processes import is_first_process


class TokenProgress:
    """A bar over blocks and tokens."""

    def __init__(self, bar: tqdm, blocks: int) -> None:  # type: ignore[type-arg]
        self._bar = bar
        self._blocks = blocks
        self._done = 0

    def tokens(self, count: int) -> None:
        """Note that tokens have passed a block."""
        self._bar.update(count)

    def block_done(self) -> None:
        """Note that a block is finished."""
        self._done += 1
        self._bar.set_postfix_str(f"block {self._done}/{self._blocks}")


@contextmanager
def token_progress(label: str, blocks: int, token_passes: int) -> Iterator[TokenProgress]:
    """Show progress over `blocks` blocks and `token_passes` tokens (all blocks together)."""
    # Of several processes one shows its bar; None hides it where there is no terminal.
    disable = None if is_first_process() else True
    with tqdm(
        desc=label, total=token_passes, unit="tok", unit_scale=True, disable=disable, leave=False
    ) as bar:
        yield TokenProgress(bar, blocks)


def item_progress(label: str, total: int, unit: str) -> tqdm:  # type: ignore[type-arg]
    """Return a bar over `total` items of a named unit."""
    return tqdm(desc=label, total=total, unit=unit, disable=None, leave=False)


@contextmanager
def library_progress() -> Iterator[None]:
    """Let transformers show its own bars on a terminal only.

    Some of its bars obey its switch and some do not; the latter are swallowed. Errors are
    raised as exceptions and pass.
    """
    from transformers.utils import logging

    if sys.stderr.isatty():
        yield
        return
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()

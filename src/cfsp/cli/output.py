"""What commands print: one JSON object for machines, tables for people."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cfsp.result.tables import Table
from cfsp.result.tables import estimate as estimate
from cfsp.result.tables import human_bytes as human_bytes
from cfsp.result.tables import human_count as human_count

if TYPE_CHECKING:
    from cfsp.result.facts import Fact

# The JSON of what a command did, and what says it to people; None where there is nothing to say.
Told = tuple[Any, Callable[[], object]] | None


class _PlainLines(logging.Handler):
    """Shows a message as it is, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line to standard error, as it is at that moment."""
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def show_messages() -> None:
    """Let people see what the library has to say: plain lines on standard error."""
    logger = logging.getLogger("cfsp")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _PlainLines) for handler in logger.handlers):
        logger.addHandler(_PlainLines())


def tell(told: Told, *, as_json: bool) -> None:
    """Print what a command did: as one JSON object, or for people."""
    if told is not None:
        value, say = told
        print(json.dumps(value, indent=2)) if as_json else say()


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> None:
    """Print columns: the first `left` aligned left, the others right."""
    print(Table(head, rows, left=left).to_text())


def print_facts(facts: Iterable[Fact]) -> None:
    """Print numbers before and after, and what came of them; nothing without any."""
    from cfsp.result.facts import labels

    rows = [(name, *fact.row) for fact, name in labels(facts).items()]
    if rows:
        print_table(("", "before", "after", "change"), rows)
        print()


def print_passes(passes: Mapping[str, Mapping[str, float]]) -> None:
    """Print how much of each pass over the blocks was pure computing."""
    for name, seconds in passes.items():
        waits = ", ".join(
            f"{part.replace('_', ' ')} {seconds[part]:.1f} s"
            for part in ("weights", "hidden_states", "saving")
            if part in seconds
        )
        print(
            f"{name}: {seconds['ratio']:.2f} times its pure compute time of "
            f"{seconds['compute']:.1f} s ({waits})"
        )

"""What commands print: one JSON object for machines, tables for people."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TextIO

from cfsp.errors import OutputError
from cfsp.processes import is_first_process
from cfsp.result.tables import Table
from cfsp.result.tables import estimate as estimate
from cfsp.result.tables import human_bytes as human_bytes
from cfsp.result.tables import human_count as human_count

if TYPE_CHECKING:
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.result.facts import Fact

# The JSON of what a command did, and what says it to people; None where there is nothing to say.
Told = tuple[Any, Callable[[], object]] | None


class _PlainLines(logging.Handler):
    """Shows a message as it is, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line to standard error, as it is at that moment."""
        from tqdm import tqdm

        from cfsp.progress import own_stderr

        try:
            tqdm.write(self.format(record), file=own_stderr())
        except BrokenPipeError:
            raise
        except OSError:  # its terminal is gone, or its disk is full: the work goes on
            drop(sys.stderr)


def show_messages() -> None:
    """Let people see what the library has to say: plain lines on standard error.

    Several processes would say the same; the first does.
    """
    logger = logging.getLogger("cfsp")
    logger.setLevel(logging.INFO if is_first_process() else logging.ERROR)
    if not any(isinstance(handler, _PlainLines) for handler in logger.handlers):
        logger.addHandler(_PlainLines())


def tell(told: Told, *, as_json: bool) -> None:
    """Print what a command did: as one JSON object, or for people."""
    if told is None:
        return
    value, say = told
    if isinstance(sys.stdout, TextIOWrapper):
        # Few encodings have a minus, and no error takes what was measured with it.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(_as_json(value)) if as_json else say()
        print(end="", flush=True)  # standard output may be closed
    except BrokenPipeError:
        raise
    except OSError as error:
        drop(sys.stdout)
        raise OutputError(
            f"standard output cannot be written: {error.strerror}; the command itself is done, "
            "only what it tells is lost"
        ) from error


def _as_json(value: Any) -> str:
    """Return JSON, which has no number that is infinite or none: null stands in its place."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2)


def drop(stream: TextIO) -> None:
    """Write no more to a standard stream: Python would complain at exit of what it could not."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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


def print_plan(plan: PruningPlan) -> None:
    """Print importance and width of every unit."""
    from cfsp.result.facts import unit_rows

    rows = [
        (*row, f"{unit.kept_share:.0%}", f"{'#' * round(20 * unit.kept_share):<20}")
        for row, unit in zip(unit_rows(plan.units), plan.units, strict=True)
    ]
    print_table(("block", "distance", "importance", "channels", "kept", "", ""), rows)
    if plan.only("ffn").narrows:
        multiple = plan.criterion["multiple"]
        print(f"\nwidths are multiples of {multiple}; docs/quantise.md says for whom that is right")


def print_goal(resolution: dict[str, Any]) -> None:
    """Print what was tried for a goal, as its JSON has it; nothing if nothing was."""
    from cfsp.planning.candidate import Candidate
    from cfsp.result.facts import goal_in_words, goal_table

    if (tried := goal_table(resolution)) is not None:
        chosen = Candidate.from_json(resolution["chosen"]).in_words
        print(f"{tried.to_text()}\n\n{goal_in_words(resolution)}: without {chosen}\n")

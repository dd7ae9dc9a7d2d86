"""What lm-evaluation-harness says, and what of it is passed on."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from cfsp.errors import TaskError, first_line
from cfsp.progress import library_progress

logger = logging.getLogger(__name__)


@contextmanager
def telling_what_is_too_long(name: str, most: int) -> Iterator[None]:
    """Turn the harness's own check of what it is to score into a `TaskError`; say what it cuts."""
    reader, cut = logging.getLogger("lm_eval.models.huggingface"), []

    def is_to_be_seen(record: logging.LogRecord) -> bool:
        if "runcat" in record.getMessage():  # "Truncating", "Left truncation"
            cut.append(record)
        return record.levelno >= logging.ERROR

    reader.addFilter(is_to_be_seen)
    reader.setLevel(logging.WARNING)
    try:
        yield
    except AssertionError as error:
        raise TaskError(
            f"{name} has something that cannot be scored, such as a choice of more than the "
            f"{most} tokens that the model reads ({first_line(error)}); leave that out of "
            f"--task-data, give a --limit, or leave {name} out"
        ) from error
    finally:
        reader.setLevel(logging.NOTSET)
        reader.removeFilter(is_to_be_seen)
    if cut:
        told = "%s: %d times the beginning was left out of more than the %d tokens that are read"
        logger.warning(told, name, len(cut), most)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep standard output free for results, and all but bars off what is not a terminal."""
    harness = logging.getLogger("lm_eval")
    level = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with redirect_stdout(sys.stderr), library_progress():
            yield
    finally:
        harness.setLevel(level)

"""Output directories that appear whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cfsp.errors import OutputError


def check_output_is_free(target: Path) -> None:
    """Check, before the work begins, that a directory can be created at `target`.

    Raises:
        OutputError: it exists and is not empty, or its parent can't be written to.
    """
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} exists and is a file; choose another output directory")
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(f"{target} exists and is not empty; choose another output directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create {target.parent}: {error.strerror}") from error
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"cannot write to {target.parent}; choose another output directory")


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Give a temporary sibling of `target`; rename it to `target` when the block succeeds.

    Raises:
        OutputError: the target exists and is not empty, or the disk is full or read-only.
    """
    check_output_is_free(target)
    _remove_abandoned(target)
    staging = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        staging.mkdir()
        yield staging
        check_output_is_free(target)
        staging.rename(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give a temporary sibling path of `target`; rename the file to `target` on success.

    Raises:
        OutputError: the target exists, or the disk is full or read-only.
    """
    if target.exists():
        raise OutputError(f"{target} exists already; choose another file")
    staging = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield staging
        staging.rename(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        staging.unlink(missing_ok=True)


def _remove_abandoned(target: Path) -> None:
    """Remove what earlier runs for the same target left behind when they were killed."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        owner = leftover.name.rpartition("-")[2]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file aside and rename it into place.

    Raises:
        OutputError: the disk is full or not writable.
    """
    staging = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.rename(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        staging.unlink(missing_ok=True)

"""Output directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
import reprlib
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from cfsp.checkpoint.locating import given_path
from cfsp.errors import ChangedFileError, OutputError, UsageError, first_line

# Numbers of processes are those of one machine, or one container, which has a name of its own.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_A_DAY = 86400.0
# What NFS says without a daemon of locks, and some file systems of clusters and in user space. What
# no system call is there for, the lock's own library knows.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)


def output_path(out: str | Path) -> Path:
    """Return where an output of a call is to go."""
    if not isinstance(out, str | Path):
        raise UsageError(f"expected out=, the path of what is new, found {reprlib.repr(out)}")
    path = given_path(out)
    # The longest name that is made of it, beside it.
    given_path(_staging_of(before_training(path)))
    return path


def before_training(out: Path) -> Path:
    """Return where the pruned model lies that is trained into `out`."""
    return out.parent / f"{out.name}-pruned"


def check_output_is_free(target: Path) -> None:
    """Check, before the work begins, that a directory can be created at `target`."""
    if target.is_symlink():  # to which nothing can be renamed
        raise OutputError(f"{target} is a link; choose the output directory that it leads to")
    _check_is_no_file(target)
    if target.is_dir() and target.samefile("."):  # it would be another one afterwards
        raise OutputError(
            f"{target} is the current directory; choose another output directory, such as one in it"
        )
    try:
        is_used = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise cannot_write(target, error) from error
    if is_used:
        raise OutputError(f"{target} exists and is not empty; choose another output directory")
    # Not of the absolute path: what is above the current directory need not be readable.
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write to {parent.absolute()}; choose another output directory")


def _check_is_no_file(directory: Path) -> None:
    """Check that a directory which need not be there yet is nothing else."""
    if directory.is_dir():
        return
    if directory.is_symlink():
        raise OutputError(f"{directory} is a link to no directory; choose another output directory")
    if directory.exists():
        raise OutputError(f"{directory} exists and is a file; choose another output directory")


def check_file_is_free(target: Path) -> None:
    """Check that an output which is a file is not there yet."""
    if target.exists():
        raise OutputError(f"{target} exists already; choose another file")


def check_is_outside(target: Path, source: Path) -> None:
    """Check that an output does not lie in the directory that it is made from."""
    if target.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{target} lies inside the source {source}; choose another output")


@contextmanager
def created_parents(target: Path) -> Iterator[None]:
    """Create the directories that an output is to lie in; remove them if nothing comes of it."""
    missing = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create {target.parent}: {error.strerror}; choose another output"
        ) from error
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def exclusive(directory: Path, patience: float = 0) -> Iterator[None]:
    """Keep other runs out of a directory; it is created, and removed if it is empty at the end.

    The system gives the lock back when the process ends, however that happens. Another run is
    waited for so many seconds.
    """
    # It lies beside the directory, so that an empty one stays one.
    own = directory.absolute()
    lock_file = own.parent / f".{own.name}.lock"
    try:
        _check_is_no_file(directory)
        directory.mkdir(parents=True, exist_ok=True)
        lock = _acquired(lock_file, patience)
        # Who held it until now may have removed the directory.
        directory.mkdir(parents=True, exist_ok=True)
    except Timeout as error:
        raise OutputError(
            f"another run is working in {directory}; wait for it, "
            f"{_if_killed(Path(error.lock_file))}or choose another output"
        ) from error
    except OSError as error:
        raise cannot_write(directory, error) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # there is something in it, or it is gone
            directory.rmdir()
        # While it is held: whoever has opened it meanwhile sees that it is gone.
        with contextlib.suppress(OSError):  # Windows removes it when it is released
            lock_file.unlink()
        lock.release()


def _acquired(lock_file: Path, patience: float) -> BaseFileLock:
    """Return the lock of a file, acquired; where the file system has none, by another file."""
    lock: BaseFileLock = FileLock(lock_file, timeout=patience)
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        lock_file.unlink(missing_ok=True)  # it was to be locked, and nobody can
        lock = SoftFileLock(lock_file.with_suffix(".soft.lock"), timeout=patience)
        lock.acquire()
    return lock


def _if_killed(lock_file: Path) -> str:
    """Return what to do about a lock that a killed run left, if it can have left one.

    Where the file system has no locks, a file that says who has it is one; it outlives its machine.
    """
    with contextlib.suppress(OSError):
        if lock_file.stat().st_size:
            return f"remove {lock_file} if it was killed on another machine, "
    return ""


@contextmanager
def staged_directory(target: Path) -> Iterator[Path]:
    """Give a temporary sibling of `target`; rename it to `target` when the block succeeds."""
    check_output_is_free(target)
    with _staged(target) as staging:
        staging.mkdir()
        yield staging
        check_output_is_free(target)


@contextmanager
def staged_file(target: Path) -> Iterator[Path]:
    """Give a temporary sibling path of `target`; rename the file to `target` on success."""
    check_file_is_free(target)
    with _staged(target) as staging:
        yield staging
        if target.exists():
            raise OutputError(f"another run has written {target} meanwhile; it was kept")


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Give a path beside the target, and rename what is there in the end; remove it on failure."""
    remove_abandoned(target)
    staging = _staging_of(target)
    with created_parents(target):
        try:
            yield staging
            staging.rename(target)
        except OSError as error:
            read = isinstance(error, FileNotFoundError) and error.filename
            if read and not str(read).startswith(str(staging)):
                raise ChangedFileError.gone(read, error) from error
            raise cannot_write(target, error) from error
        finally:
            _remove(staging)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is not there, or nothing can be removed there
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def cannot_write(target: Path, error: Exception) -> OutputError:
    """Return the error that something cannot be written, of what was raised meanwhile."""
    why = getattr(error, "strerror", None) or first_line(error)
    return OutputError(f"cannot write {target}: {why}; make room there, or choose another output")


def _staging_of(target: Path) -> Path:
    """Return where this process puts together what is to be at a target."""
    return target.parent / f".{target.name}.partial-{_MACHINE}-{os.getpid()}"


def remove_abandoned(target: Path) -> None:
    """Remove what earlier runs for the same target left behind when they were killed.

    Whether those of another machine or container still run nobody knows here: theirs goes when it
    is a day old.
    """
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
        # An exporter adds an ending to its staging file for a second one.
        owner = leftover.name.rpartition(".partial-")[2].partition(".")[0]
        machine, _, process = owner.rpartition("-")
        with contextlib.suppress(OSError):  # it is gone
            if machine != _MACHINE or not process.isdigit():
                is_there = time.time() - leftover.stat().st_mtime < _A_DAY
            else:
                is_there = int(process) != os.getpid() and psutil.pid_exists(int(process))
            if not is_there:
                _remove(leftover)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write a file aside and rename it into place."""
    with _staged(given_path(path)) as staging, staging.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

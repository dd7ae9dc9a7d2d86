"""Reading the next thing in a thread while the current one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Gives what was read, in order; always one thing ahead and never two."""

    def __init__(
        self, pool: ThreadPoolExecutor, read: Callable[[int], T], indices: Sequence[int]
    ) -> None:
        self._pool = pool
        self._read = read
        self._left = list(indices)
        self._pending: Future[T] | None = None
        self._begin()

    def take(self) -> T:
        """Return the next thing, waiting for it if need be, and begin to read the one after.

        Nothing of it is kept here: it is gone when the caller drops it.

        Raises:
            Exception: whatever reading it raised.
        """
        assert self._pending is not None
        done, self._pending = self._pending, None
        value = done.result()
        self._begin()
        return value

    def _begin(self) -> None:
        if self._left:
            self._pending = self._pool.submit(self._read, self._left.pop(0))


@contextmanager
def read_ahead(read: Callable[[int], T], indices: Sequence[int]) -> Iterator[ReadAhead[T]]:
    """Read things by index, one ahead of the caller, in one thread."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead") as pool:
        yield ReadAhead(pool, read, indices)

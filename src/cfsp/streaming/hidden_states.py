"""The hidden states between two blocks, in memory or, above a limit, in a memory-mapped file.

They are all that a pass carries from block to block, and the only part of its memory that grows
with the text. Values are the same bits either way.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from cfsp.errors import OutputError

Rows = slice | list[int]  # windows that come one after the other, or any


class HiddenStates:
    """Hidden states of all windows, read and written batch by batch: one tensor.

    With a directory it is a file there, of which no page stays resident longer than a batch. The
    file has no name, so that it goes with the process, however that ends. A GPU copies from and to
    `pinned` memory.
    """

    def __init__(
        self,
        shape_NTD: tuple[int, ...],
        dtype: torch.dtype,
        directory: Path | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self.nbytes = math.prod(shape_NTD) * dtype.itemsize
        self._map: mmap.mmap | None = None
        if directory is None:
            self._hidden_NTD = torch.empty(shape_NTD, dtype=dtype, pin_memory=pinned)
        else:
            self._map = _mapped_file(directory, self.nbytes)
            self._hidden_NTD = torch.frombuffer(self._map, dtype=dtype).view(shape_NTD)

    def read(self, batch: Rows) -> Tensor:
        """Return the windows of a batch, BTD; to be used before they are written."""
        return self._hidden_NTD[batch]

    def write(self, batch: slice, hidden_BTD: Tensor) -> None:
        """Set the windows of a batch, from any device."""
        self._hidden_NTD[batch] = hidden_BTD
        self.forget(batch)

    def forget(self, batch: slice) -> None:
        """Let the memory of a batch go where a file has it; it can be read again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            window = self.nbytes // len(self._hidden_NTD)
            start = batch.start * window // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, batch.stop * window - start)

    def save(self, path: Path) -> None:
        """Copy the states to a file; they are on disk when this returns."""
        do = "free the disk or take fewer windows"
        with _making_room(path.parent, self.nbytes, do), path.open("wb") as file:
            for data in self._bytes_of_windows():
                file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def load(self, path: Path) -> None:
        """Read what `save` wrote; a ValueError if the file has another size."""
        if (found := path.stat().st_size) != self.nbytes:
            raise ValueError(found)
        with path.open("rb") as file:
            for data in self._bytes_of_windows():
                file.readinto(data)

    def _bytes_of_windows(self) -> Iterator[memoryview]:
        for window in range(len(self._hidden_NTD)):
            yield self._hidden_NTD[window].view(-1).view(torch.uint8).numpy().data
            self.forget(slice(window, window + 1))


def _mapped_file(directory: Path, nbytes: int) -> mmap.mmap:
    more = "raise --memory-budget (of prune and calibrate)"
    do = f"free the disk, take fewer windows, or {more}"
    with _making_room(directory, nbytes, do), tempfile.TemporaryFile(dir=directory) as file:
        # A hole that cannot be filled later would kill the process, not raise.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        else:
            file.truncate(nbytes)
        return mmap.mmap(file.fileno(), nbytes)


@contextmanager
def _making_room(directory: Path, nbytes: int, do: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot make room for {nbytes / 1e9:.1f} GB of hidden states in {directory} "
            f"({error.strerror or error}); {do}"
        ) from error


# Makes room for hidden states, from their shape NTD; of a resumed pass it gives those that enter a
# later block.
Room = Callable[[tuple[int, ...]], HiddenStates]

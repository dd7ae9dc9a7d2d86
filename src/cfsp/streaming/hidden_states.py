"""The hidden states between two blocks, in memory or, above a limit, in a memory-mapped file.

They are all that a pass carries from block to block, and the only part of its memory that grows
with the text. Two files take turns: the one that was saved last is only read until the next is
complete, so that a killed pass always finds one whole. Values are the same bits either way.

Shapes: N windows, B windows in a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from cfsp.errors import OutputError

Rows = slice | list[int]  # windows that come one after the other, or any

_FILES = ("hidden-0.bin", "hidden-1.bin")


class HiddenStates:
    """Hidden states of all windows, read and written batch by batch: one tensor.

    Within a block every batch is read before it is written; `swap_buffers` ends the block. `save`
    puts copies into a directory; `saved` is what it returned in an earlier process, to go on from.
    A GPU copies from and to pinned memory.
    """

    def __init__(
        self,
        shape_NTD: tuple[int, ...],
        dtype: torch.dtype,
        directory: Path | None = None,
        saved: str | None = None,
        *,
        pinned: bool = False,
    ) -> None:
        self.shape_NTD, self.nbytes = shape_NTD, math.prod(shape_NTD) * dtype.itemsize
        self._hidden_NTD = torch.empty(shape_NTD, dtype=dtype, pin_memory=pinned)
        self._source = self._target = _FILES[0]
        self._directory, self._saved = directory, saved
        if saved is not None:
            assert directory is not None
            with (directory / saved).open("rb") as file:
                count = file.readinto(self._bytes())
                assert count == self.nbytes, (saved, count)

    def read(self, batch: Rows) -> Tensor:
        """Return the windows of a batch, BTD; to be used before they are written."""
        return self._view(self._source)[batch]

    def write(self, batch: slice, hidden_BTD: Tensor) -> None:
        """Set the windows of a batch, from any device."""
        self._view(self._target)[batch] = hidden_BTD
        self.forget(batch)

    def read_written(self, batch: Rows) -> Tensor:
        """Return the windows of a batch as written in this block, before `swap_buffers`."""
        return self._view(self._target)[batch]

    def forget(self, batch: slice) -> None:
        """Let the memory of a batch go where a file has it; it can be read again."""

    def swap_buffers(self) -> None:
        """Note that all batches have been written: they are what is read from now on."""

    def save(self) -> str:
        """Put the states on disk, after `swap_buffers`; return the name of their file."""
        assert self._directory is not None
        self._saved = _other(self._saved)
        try:
            with (self._directory / self._saved).open("wb") as file:
                file.write(self._bytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            do = "free the disk or take fewer windows"
            raise _no_room(self._directory, self.nbytes, error, do) from error
        return self._saved

    def _view(self, name: str) -> Tensor:
        """Return all windows, of one of two files where there are some."""
        return self._hidden_NTD

    def _bytes(self) -> memoryview:
        return self._hidden_NTD.view(-1).view(torch.uint8).numpy().data


class HiddenInFile(HiddenStates):
    """One or two memory-mapped files, of which no page stays resident longer than a batch.

    The second file exists from the first `save` on. Where nothing is `kept` for another run, the
    file has no name, so that it goes with the process, however that ends. Where the disk has no
    room, what reads or writes raises OutputError.
    """

    def __init__(
        self,
        shape_NTD: tuple[int, ...],
        dtype: torch.dtype,
        directory: Path,
        saved: str | None = None,
        *,
        kept: bool = True,
    ) -> None:
        self.shape_NTD, self.nbytes = shape_NTD, math.prod(shape_NTD) * dtype.itemsize
        self._dtype, self._path, self._is_kept = dtype, directory, kept
        self._maps: dict[str, mmap.mmap] = {}
        self._source = saved or _FILES[0]
        self._target = _other(saved) if saved else _FILES[0]

    def forget(self, batch: slice) -> None:
        """Let the pages of a batch go: they are in the page cache."""
        window = math.prod(self.shape_NTD[1:]) * self._dtype.itemsize
        start = batch.start * window // mmap.PAGESIZE * mmap.PAGESIZE
        stop = batch.stop * window
        for name in {self._source, self._target} & set(self._maps):
            if hasattr(mmap, "MADV_DONTNEED"):
                self._maps[name].madvise(mmap.MADV_DONTNEED, start, stop - start)

    def swap_buffers(self) -> None:
        """Read from now on what was written."""
        self._source = self._target

    def save(self) -> str:
        """Flush the file that is read, and write to the other one from now on."""
        self._maps[self._source].flush()
        self._target = _other(self._source)
        return self._source

    def _view(self, name: str) -> Tensor:
        if name not in self._maps:
            self._maps[name] = self._open(self._path / name)
        flat = torch.frombuffer(self._maps[name], dtype=self._dtype)
        return flat.view(self.shape_NTD)

    def _open(self, path: Path) -> mmap.mmap:
        nbytes = self.nbytes
        try:
            with path.open("r+b" if path.exists() else "w+b") as file:
                # A hole that cannot be filled later would kill the process, not raise.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, nbytes)
                else:
                    file.truncate(nbytes)
                mapped = mmap.mmap(file.fileno(), nbytes)
            if not self._is_kept:
                with suppress(OSError):  # Windows keeps the name of what is mapped
                    path.unlink()
            return mapped
        except OSError as error:
            more = "raise --memory-budget (of prune and calibrate)"
            do = f"free the disk, take fewer windows, or {more}"
            raise _no_room(path.parent, nbytes, error, do) from error


def _no_room(directory: Path, nbytes: int, error: OSError, do: str) -> OutputError:
    return OutputError(
        f"cannot make room for {nbytes / 1e9:.1f} GB of hidden states in {directory} "
        f"({error.strerror or error}); {do}"
    )


def _other(name: str | None) -> str:
    return _FILES[1] if name == _FILES[0] else _FILES[0]


# Makes room for hidden states, from their shape NTD; of a resumed pass it gives those that enter a
# later block.
Room = Callable[[tuple[int, ...]], HiddenStates]

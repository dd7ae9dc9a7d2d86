"""The header of a .gguf file, walked within the bounds of the file before anybody believes it.

Readers take its counts and lengths at their word: one that claims 2^60 entries would keep them
busy, and growing, for ever.

Format: magic, version, number of tensors, number of key-value pairs, the pairs, then name,
dimensions, type and offset of every tensor
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from cfsp.errors import CheckpointError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
# Type -> bytes of one value.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MOST_DIMENSIONS = 8


def check_gguf(path: Path) -> None:
    """Check that everything that the header announces is in the file."""
    try:
        with path.open("rb") as file:
            _Walk(file, path.stat().st_size).header()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a readable GGUF file: {error}; download it again"
        ) from error


class _Walk:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def header(self) -> None:
        if self._file.read(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("<I")
        if not 2 <= version <= 3:
            raise ValueError(f"it has version {version}, expected 2 or 3")
        tensors, pairs = self._number("<Q"), self._number("<Q")
        for _ in range(pairs):
            self._string()
            self._value(self._number("<I"))
        for _ in range(tensors):
            self._string()
            dimensions = self._number("<I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            self._skip(8 * dimensions + 4 + 8)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind != _ARRAY:
            self._skip(self._size_of(kind))
        else:
            inner, count = self._number("<I"), self._number("<Q")
            if inner == _STRING:
                for _ in range(count):
                    self._string()
            else:
                self._skip(count * self._size_of(inner))

    @staticmethod
    def _size_of(kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"a value has the unknown type {kind}")
        return _SIZES[kind]

    def _string(self) -> None:
        self._skip(self._number("<Q"))

    def _number(self, form: str) -> int:
        data = self._file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError(f"its header reaches beyond its {self._size} bytes")
        return int(struct.unpack(form, data)[0])

    def _skip(self, nbytes: int) -> None:
        if self._file.tell() + nbytes > self._size:
            raise ValueError(f"its header reaches beyond its {self._size} bytes")
        self._file.seek(nbytes, 1)

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
            _walk(file, path.stat().st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a readable GGUF file: {error}; download it again"
        ) from error


def _walk(file: BinaryIO, size: int) -> None:
    def skip(nbytes: int) -> None:
        if file.tell() + nbytes > size:
            raise ValueError(f"its header reaches beyond its {size} bytes")
        file.seek(nbytes, 1)

    def number(form: str) -> int:
        data = file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError(f"its header reaches beyond its {size} bytes")
        return int(struct.unpack(form, data)[0])

    def values(kind: int, count: int) -> None:
        if kind == _STRING:
            for _ in range(count):
                skip(number("<Q"))
        elif kind in _SIZES:
            skip(count * _SIZES[kind])
        else:
            raise ValueError(f"a value has the unknown type {kind}")

    if file.read(4) != _MAGIC:
        raise ValueError("it does not begin with GGUF")
    version = number("<I")
    if not 2 <= version <= 3:
        raise ValueError(f"it has version {version}, expected 2 or 3")
    tensors, pairs = number("<Q"), number("<Q")
    for _ in range(pairs):
        values(_STRING, 1)
        kind, count = number("<I"), 1
        if kind == _ARRAY:
            kind, count = number("<I"), number("<Q")
        values(kind, count)
    for _ in range(tensors):
        values(_STRING, 1)
        dimensions = number("<I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        skip(8 * dimensions + 4 + 8)

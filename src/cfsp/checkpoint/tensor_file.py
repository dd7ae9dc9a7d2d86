"""One safetensors file, read and written as a stream.

Reading goes through `read`, not through a memory map: resident memory is then exactly what
the caller holds, and a file that shrinks under us is an error instead of a crash. Writing
needs the header first, which holds only names, dtypes and shapes, so tensors can be produced
one at a time while the file grows.

Format: 8 bytes little-endian header length, a JSON header, then the raw tensors
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cfsp.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What cures a damaged file.
AGAIN = "download or save it again"

_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 16 << 20
# A product of many larger ones could not even be printed.
_MOST_BYTES = 1 << 63


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of the raw data in bytes."""
        return self.elements * self.dtype.itemsize

    def with_length(self, axis: int, length: int) -> TensorSpec:
        """Return the same spec with another length along one axis."""
        shape = list(self.shape)
        shape[axis] = length
        return TensorSpec(self.dtype, tuple(shape))


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return dtypes and shapes of tensors."""
    return {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


@dataclass(frozen=True)
class FileTensor:
    """A tensor in a file; nothing is read before it is asked for."""

    path: Path
    name: str
    spec: TensorSpec
    _start: int  # its first byte
    _version: tuple[int, ...]  # of the file

    def read(self) -> Tensor:
        """Return the tensor in the dtype in which it is stored."""
        return self.read_part(0, self.spec.elements).reshape(self.spec.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return what is from one index of the first axis to another."""
        before, found = (self.spec.with_length(0, n) for n in (start, stop - start))
        part = self.read_part(before.elements, before.elements + found.elements)
        return part.reshape(found.shape)

    def read_part(self, start: int, stop: int) -> Tensor:
        """Return the elements from one to another, flattened."""
        dtype = self.spec.dtype
        data = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        view = data.numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + start * dtype.itemsize)
            done = 0
            while done < len(data):
                count = file.readinto(view[done:])
                if not count:
                    raise self._changed()
                done += count
            self._check_unchanged(file.fileno())
        return data.view(dtype)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the raw bytes in pieces of at most 16 MB."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start)
            left = self.spec.nbytes
            while left:
                piece = file.read(min(left, _CHUNK_BYTES))
                if not piece:
                    raise self._changed()
                left -= len(piece)
                self._check_unchanged(file.fileno())
                yield memoryview(piece)

    def _check_unchanged(self, handle: int) -> None:
        if _version(handle) != self._version:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self.path} was changed while it was read; start again")


class TensorFile:
    """A safetensors file whose header has been read and checked against the file's size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, FileTensor] = {}
        try:
            with path.open("rb") as file:
                self._version = _version(file.fileno())
                self._read_header(file.read(8), file.read, self._version[0])
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        self.specs = {name: tensor.spec for name, tensor in self.tensors.items()}

    def _read_header(self, prefix: bytes, read: Callable[[int], bytes], file_bytes: int) -> None:
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(_MAX_HEADER_BYTES, file_bytes - 8):
            raise self._damaged(
                f"is not a complete safetensors file: it has {file_bytes} bytes and announces a "
                f"header of {length}"
            )
        try:
            header = json.loads(read(length))
            entries = [
                (*entry["data_offsets"], name, entry["dtype"], tuple(entry["shape"]))
                for name, entry in header.items()
                if name != "__metadata__"
            ]
            entries.sort()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged("is not a safetensors file: its header is not readable") from error
        end = 0
        for start, stop, name, dtype_name, shape in entries:
            if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
                raise CheckpointError(
                    f"{self.path}: tensor {name} has dtype {dtype_name}, "
                    f"expected one of {', '.join(DTYPES)}"
                )
            if not all(isinstance(n, int) and 0 <= n < _MOST_BYTES for n in (start, stop, *shape)):
                raise self._damaged(f"has a tensor {name} of impossible shape {shape}")
            spec = TensorSpec(DTYPES[dtype_name], shape)
            if start != end or stop - start != spec.nbytes:
                raise self._damaged(
                    f"is damaged: tensor {name} {list(shape)} {dtype_name} needs {spec.nbytes} "
                    f"bytes from {end}, its header says {start} to {stop}"
                )
            end = stop
            at = 8 + length + start
            self.tensors[name] = FileTensor(self.path, name, spec, at, self._version)
        if 8 + length + end != file_bytes:
            raise self._damaged(
                f"is truncated or damaged: its header describes {8 + length + end} bytes, the file "
                f"has {file_bytes}"
            )

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}; {AGAIN}")

    def read(self, name: str) -> Tensor:
        """Return one tensor in the dtype in which it is stored."""
        return self.tensors[name].read()


def _version(handle: int) -> tuple[int, int, int]:
    """Return what differs after an open file has been written to or replaced; first its bytes."""
    found = os.fstat(handle)
    return found.st_size, found.st_ino, found.st_mtime_ns


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor that will be written: its spec is known now, its bytes are made when needed."""

    name: str
    spec: TensorSpec
    chunks: Callable[[], Iterator[memoryview]]


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the raw bytes of a tensor in memory."""
    data = tensor.detach().cpu().contiguous().view(-1)
    if data.numel():
        yield data.view(torch.uint8).numpy().data


def outgoing_tensor(name: str, tensor: Tensor) -> OutgoingTensor:
    """Return a tensor in memory as one to be written."""
    spec = TensorSpec(tensor.dtype, tuple(tensor.shape))
    return OutgoingTensor(name, spec, lambda: tensor_chunks(tensor))


def write_tensor_file(path: Path, tensors: Sequence[OutgoingTensor]) -> str:
    """Write tensors one after another, flushed to the disk; return the file's SHA-256 as hex."""
    # The digest is computed on a second thread, so that it hides behind the writing.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        stop = offset + tensor.spec.nbytes
        header[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.spec.dtype],
            "shape": list(tensor.spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as pool:
        pending: Future[None] | None = None
        for chunk in _file_chunks(text, tensors):
            if pending is not None:
                pending.result()
            pending = pool.submit(digest.update, chunk)
            _write_all(file.write, chunk)
        if pending is not None:
            pending.result()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _file_chunks(header: bytes, tensors: Sequence[OutgoingTensor]) -> Iterator[memoryview]:
    yield memoryview(len(header).to_bytes(8, "little") + header)
    for tensor in tensors:
        written = 0
        for chunk in tensor.chunks():
            written += chunk.nbytes
            yield chunk
        # The header is already on disk: bytes that do not match it would corrupt all that follow.
        assert written == tensor.spec.nbytes, (tensor.name, written, tensor.spec)


def _write_all(write: Callable[[memoryview], int | None], chunk: memoryview) -> None:
    while chunk.nbytes:
        chunk = chunk[write(chunk) or 0 :]

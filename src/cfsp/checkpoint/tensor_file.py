"""The safetensors files of a checkpoint, read and written as a stream: one, or several by an index.

Tensors are read through `read`, not through a memory map: resident memory is then exactly what
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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import str_to_torch_dtype

from cfsp.errors import ChangedFileError, CheckpointError, first_line, refusing_bad_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
_LONGEST_NAME = 200

# Of block scales (MX formats) transformers has no name.
DTYPES: dict[str, torch.dtype] = {**str_to_torch_dtype, "F8_E8M0": torch.float8_e8m0fnu}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

AGAIN = "download or save it again"  # what cures a damaged file

_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """Return those of a tensor."""
        return TensorSpec(tensor.dtype, tuple(tensor.shape))

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def row(self) -> int:
        """Number of values at one index of the first axis."""
        return math.prod(self.shape[1:])

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
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


class StoredTensor:
    """A tensor of a checkpoint, or of one to be written; only its spec is known at once."""

    spec: TensorSpec

    def read_part(self, start: int, stop: int) -> Tensor:
        """Return the elements from one to another, flattened."""
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Tensor:
        """Return what is from one index of the first axis to another."""
        part = self.read_part(start * self.spec.row, stop * self.spec.row)
        return part.reshape(stop - start, *self.spec.shape[1:])

    def read(self, row: int | None = None) -> Tensor:
        """Return the tensor in its dtype, or what it has at one index of its first axis."""
        if row is not None:
            return self.rows(row, row + 1)[0]
        return self.read_part(0, self.spec.elements).reshape(self.spec.shape)

    def chunks(self) -> Iterator[memoryview]:
        """Yield the raw bytes in pieces of whole rows, of at most 16 MB unless one row has more."""
        row = max(1, self.spec.row)
        step = max(1, _CHUNK_BYTES // self.spec.dtype.itemsize // row) * row
        for start in range(0, self.spec.elements, step):
            yield from tensor_chunks(self.read_part(start, min(start + step, self.spec.elements)))


@dataclass(frozen=True)
class FileTensor(StoredTensor):
    """A tensor in a file."""

    path: Path
    name: str
    spec: TensorSpec
    _start: int  # its first byte
    _version: tuple[int, ...]  # of the file

    def read_part(self, start: int, stop: int) -> Tensor:
        """Return the elements from one to another, flattened."""
        dtype = self.spec.dtype
        data = torch.empty((stop - start) * dtype.itemsize, dtype=torch.uint8)
        try:
            with self.path.open("rb") as file:
                file.seek(self._start + start * dtype.itemsize)
                count = file.readinto(data.numpy().data)
                is_as_before = count == len(data) and _version(file.fileno()) == self._version
        except OSError as error:  # by whoever writes what is made of it, it would be the output
            raise ChangedFileError.gone(self.path, error) from error
        if not is_as_before:
            raise ChangedFileError(f"{self.path} was changed while it was read; start again")
        return data.view(dtype)


@dataclass(frozen=True)
class MadeTensor(StoredTensor):
    """A tensor in memory, or one that is made whenever it is asked for."""

    spec: TensorSpec
    _make: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> MadeTensor:
        """Return a tensor in memory, for use outside of its graph."""
        # What was made in inference mode autograd refuses, and no parameter can be made of it.
        of_graph = tensor.clone if tensor.is_inference() else tensor.detach
        return MadeTensor(TensorSpec.of(tensor), of_graph)

    def read_part(self, start: int, stop: int) -> Tensor:
        """Return the elements from one to another, flattened."""
        return self._make().reshape(-1)[start:stop]

    def read(self, row: int | None = None) -> Tensor:
        """Return the tensor in its dtype, or what it has at one index of its first axis."""
        return self._make() if row is None else self._make()[row]

    def chunks(self) -> Iterator[memoryview]:
        """Yield the raw bytes at once."""
        return tensor_chunks(self._make())


def read_weights(directory: Path) -> dict[str, FileTensor]:
    """Return the tensors of the files that transformers reads: a single one goes before an index.

    Only headers are read.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return read_tensor_file(single)
    if not index.is_file():
        others = sorted(directory.glob("*.safetensors")) + sorted(directory.glob("*.bin"))
        others = [path for path in others if path.is_file()]  # no link to what was not fetched
        found, cure = "none", "download them, or save the model as safetensors"
        if others and others[0].suffix == ".bin":
            found = f"only {others[0].name}, a pickle, which can run code"
            cure = "save the model as safetensors"
        elif others:
            found = f"{others[0].name}, which nothing names"
            cure = f"download the index, or call one that has the whole model {SINGLE_FILE}"
        raise CheckpointError(
            f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE} (found: {found}); {cure}"
        )
    otherwise = "is not a checkpoint index, JSON with a weight_map; download the model again"
    with refusing_bad_json(index, otherwise):
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError("file names are not text")
    tensors: list[tuple[str, FileTensor]] = []
    for shard in shards:
        is_within = Path(shard).name == shard and len(shard) <= _LONGEST_NAME
        if not (is_within and (directory / shard).is_file()):
            raise CheckpointError(
                f"{index} names a file that is not in its directory: {shard[:_LONGEST_NAME]}; "
                f"{AGAIN}"
            )
        tensors += read_tensor_file(directory / shard).items()
    times = Counter(name for name, _ in tensors)
    if odd := weight_map.keys() ^ times.keys() or {name for name in times if times[name] > 1}:
        raise CheckpointError(
            f"{index} and the files that it names disagree about {min(odd)}; {AGAIN}"
        )
    return dict(tensors)


def read_tensor_file(path: Path) -> dict[str, FileTensor]:
    """Return the tensors of a file; the safetensors library checks its header against its size."""
    try:
        with path.open("rb") as file, safe_open(path, "numpy"):
            version, length = _version(file.fileno()), int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is no whole safetensors file ({first_line(error)}); {AGAIN}"
        ) from error
    header.pop("__metadata__", None)
    tensors: dict[str, FileTensor] = {}
    for name, entry in sorted(header.items(), key=lambda each: (each[1]["data_offsets"], each[0])):
        if (dtype := DTYPES.get(str(entry["dtype"]))) is None:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        start = 8 + length + entry["data_offsets"][0]
        spec = TensorSpec(dtype, tuple(entry["shape"]))
        tensors[name] = FileTensor(path, name, spec, start, version)
    return tensors


def _version(handle: int) -> tuple[int, int, int]:
    """Return what differs after an open file has been written to or replaced; first its bytes."""
    found = os.fstat(handle)
    return found.st_size, found.st_ino, found.st_mtime_ns


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the raw bytes of a tensor in memory."""
    data = tensor.detach().cpu().contiguous().view(-1)
    if data.numel():
        yield data.view(torch.uint8).numpy().data


def write_tensor_file(path: Path, tensors: Mapping[str, StoredTensor]) -> str:
    """Write tensors one after another, flushed to the disk; return the file's SHA-256 as hex."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        stop = offset + tensor.spec.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.spec.dtype],
            "shape": list(tensor.spec.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: bytes | memoryview) -> None:
            digest.update(data)
            file.write(data)

        write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            written = 0
            for chunk in tensor.chunks():
                written += chunk.nbytes
                write(chunk)
            # The header is already on disk: bytes that do not match it would corrupt all after.
            assert written == tensor.spec.nbytes, (name, written, tensor.spec)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_shards(
    directory: Path, tensors: Mapping[str, StoredTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Write tensors as one or more safetensors files; return the SHA-256 of each by its name.

    Bytes are made one tensor at a time. A tensor that is larger than a shard gets one of its own.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.spec.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    digests = {
        file_name: write_tensor_file(directory / file_name, {name: tensors[name] for name in names})
        for file_name, names in split.filename_to_tensors.items()
    }
    if split.is_sharded:
        weight_map = dict(sorted(split.tensor_to_filename.items()))
        index = {"metadata": split.metadata, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return digests

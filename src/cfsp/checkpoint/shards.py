"""Tensors as a checkpoint's weight files: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp.checkpoint.reading import INDEX_FILE, SINGLE_FILE
from cfsp.checkpoint.tensor_file import OutgoingTensor, write_tensor_file

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class WrittenWeights:
    """What was written.

    Attributes:
        digests: file name -> SHA-256 of its bytes.
        parameters: number of parameters.
        nbytes: bytes of all tensors.
    """

    digests: dict[str, str]
    parameters: int
    nbytes: int


def write_shards(
    directory: Path, tensors: Sequence[OutgoingTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> WrittenWeights:
    """Write tensors as one or more safetensors files.

    Args:
        directory: an existing directory.
        tensors: in the order in which they are stored; bytes are made one tensor at a time.
        max_shard_bytes: size of a shard; a larger single tensor gets a shard of its own.

    Raises:
        OSError: the disk is full or not writable.
        CheckpointError: the source of a tensor ended or changed.
    """
    shards = _into_shards(tensors, max_shard_bytes)
    digests = {}
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE_FILE
        if len(shards) > 1:
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file_name] = write_tensor_file(directory / file_name, shard)
        weight_map.update({tensor.name: file_name for tensor in shard})
    nbytes = sum(tensor.spec.nbytes for tensor in tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    parameters = sum(tensor.spec.nbytes // tensor.spec.dtype.itemsize for tensor in tensors)
    return WrittenWeights(digests, parameters, nbytes)


def _into_shards(tensors: Sequence[OutgoingTensor], max_bytes: int) -> list[list[OutgoingTensor]]:
    shards: list[list[OutgoingTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    return shards

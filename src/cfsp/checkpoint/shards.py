"""A checkpoint's weight files: one safetensors file, or several with an index."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cfsp.checkpoint.tensor_file import AGAIN, OutgoingTensor, TensorFile, write_tensor_file
from cfsp.errors import CheckpointError, refusing_bad_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MAX_SHARD_BYTES = 5_000_000_000
_LONGEST_NAME = 200


def weight_files(directory: Path) -> Sequence[TensorFile]:
    """Return the files that transformers reads: a single one goes before an index."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file():
        return [TensorFile(single)]
    if not index.is_file():
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        found = f"only {pickles[0]}, a pickle, which can run code" if pickles else "none"
        raise CheckpointError(
            f"{directory} has no {SINGLE_FILE} and no {INDEX_FILE} (found: {found}); "
            "save the model as safetensors"
        )
    otherwise = "is not a checkpoint index: no weight_map; download the model again"
    with refusing_bad_json(index, otherwise):
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError("file names are not text")
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(
                f"{index} names a file outside its directory: {shard[:_LONGEST_NAME]}; "
                "download the model again"
            )
        if len(shard) > _LONGEST_NAME or not (directory / shard).is_file():
            raise CheckpointError(
                f"{index} names {shard[:_LONGEST_NAME]}, which is missing; download it again"
            )
    files = [TensorFile(directory / shard) for shard in shards]
    stored = {name for file in files for name in file.specs}
    if missing := sorted(set(weight_map) - stored):
        raise CheckpointError(f"{index} names {missing[0]}, which no shard holds; {AGAIN}")
    for file in files:
        if extra := sorted(set(file.specs) - set(weight_map)):
            raise CheckpointError(
                f"{file.path} holds {extra[0]}, which {INDEX_FILE} does not name; {AGAIN}"
            )
    return files


def write_shards(
    directory: Path, tensors: Sequence[OutgoingTensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, str]:
    """Write tensors as one or more safetensors files; return the SHA-256 of each by its name.

    Bytes are made one tensor at a time. A tensor that is larger than a shard gets one of its own.
    """
    shards: list[list[OutgoingTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    digests, weight_map = {}, {}
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE_FILE
        if len(shards) > 1:
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file_name] = write_tensor_file(directory / file_name, shard)
        weight_map.update({tensor.name: file_name for tensor in shard})
    if len(shards) > 1:
        nbytes = sum(tensor.spec.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return digests

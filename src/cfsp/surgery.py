"""Surgery: obeys a plan, tensor by tensor.

FFN tensors lose rows or columns; everything else is copied byte for byte. Tensors stream from
the source to the new shards: one is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cfsp.checkpoint.reading import INDEX_FILE, SINGLE_FILE, WeightSource
from cfsp.checkpoint.tensor_file import (
    OutgoingTensor,
    TensorFile,
    TensorSpec,
    tensor_chunks,
    write_tensor_file,
)
from cfsp.pruning_plan import PruningPlan

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class WrittenWeights:
    """What surgery wrote.

    Attributes:
        digests: file name -> SHA-256 of its bytes.
        parameters: number of parameters.
        nbytes: bytes of all tensors.
    """

    digests: dict[str, str]
    parameters: int
    nbytes: int


def pruned_tensor(source: WeightSource, plan: PruningPlan, name: str) -> Tensor:
    """Return one tensor of the pruned model, in the source's dtype."""
    tensor = source.read(name)
    location = source.family.channel_axis(name)
    if location is None:
        return tensor
    block, axis = location
    entry = plan.blocks[block]
    if len(entry.kept) == entry.width:
        return tensor
    kept = torch.tensor(entry.kept, device=tensor.device)
    pruned = tensor.index_select(axis, kept)
    # removed + kept == before
    assert tensor.shape[axis] == entry.width
    assert pruned.shape[axis] == len(entry.kept)
    return pruned


def pruned_specs(source: WeightSource, plan: PruningPlan) -> dict[str, TensorSpec]:
    """Return dtype and shape of every tensor of the pruned model, in the source's order."""
    specs = {}
    for name, spec in source.specs.items():
        location = source.family.channel_axis(name)
        if location is not None:
            block, axis = location
            spec = spec.with_length(axis, len(plan.blocks[block].kept))
        specs[name] = spec
    return specs


def write_pruned_weights(
    source: WeightSource,
    plan: PruningPlan,
    directory: Path,
    repaired: Mapping[str, TensorFile] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> WrittenWeights:
    """Write the pruned model's tensors as one or more safetensors files.

    Args:
        source: the model.
        plan: which channels stay; must fit the source.
        directory: an existing directory.
        repaired: tensors that restoration changed, by name, already in pruned shape.
        max_shard_bytes: size of a shard; a larger single tensor gets a shard of its own.

    Raises:
        OSError: the disk is full or not writable.
        CheckpointError: the source ended or changed.
    """
    specs = pruned_specs(source, plan)
    outgoing = [_outgoing(source, plan, name, spec, repaired or {}) for name, spec in specs.items()]
    shards = _into_shards(outgoing, max_shard_bytes)
    digests = {}
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = SINGLE_FILE
        if len(shards) > 1:
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        digests[file_name] = write_tensor_file(directory / file_name, shard)
        weight_map.update({tensor.name: file_name for tensor in shard})
    nbytes = sum(spec.nbytes for spec in specs.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    parameters = sum(spec.nbytes // spec.dtype.itemsize for spec in specs.values())
    return WrittenWeights(digests, parameters, nbytes)


def _outgoing(
    source: WeightSource,
    plan: PruningPlan,
    name: str,
    spec: TensorSpec,
    repaired: Mapping[str, TensorFile],
) -> OutgoingTensor:
    if name in repaired:
        assert repaired[name].specs[name] == spec, name
        return OutgoingTensor(name, spec, lambda: repaired[name].chunks(name))
    if spec == source.specs[name]:
        return OutgoingTensor(name, spec, lambda: source.chunks(name))

    def cut() -> Iterator[memoryview]:
        return tensor_chunks(pruned_tensor(source, plan, name))

    return OutgoingTensor(name, spec, cut)


def _into_shards(tensors: list[OutgoingTensor], max_bytes: int) -> list[list[OutgoingTensor]]:
    shards: list[list[OutgoingTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.spec.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    return shards

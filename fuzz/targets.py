"""What is fuzzed: four readers of files that come from elsewhere.

An input is a JSON document that describes the file (header, index, facts), so that a mutation of
its values is a lie in the right place and not just bytes that no parser takes; an input that is no
such document is taken as the bytes of the file. Only a `CfspError` of one line may come out, and
memory may not grow by more than `MEMORY_BYTES`. Needs no fuzzer; `run.py` has one.
"""

from __future__ import annotations

import json
import resource
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from cfsp.calibration.statistics import (
    BlockStatistics,
    CalibrationRecord,
    Statistics,
    UnitStatistics,
)
from cfsp.checkpoint.gguf_import import gguf_reader
from cfsp.checkpoint.tensor_file import INDEX_FILE, read_weights
from cfsp.errors import CfspError
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan

MEMORY_BYTES = 256 << 20
_DATA_BYTES = 1 << 16
_SHARD = "model-00001-of-00001.safetensors"
_STATISTICS_KEY = "cfsp_statistics"


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        read: puts an input into a directory as files and reads them.
        seeds: inputs that are valid, to begin with.
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]


def only_our_errors(read: Callable[[], object]) -> bool:
    """Read something with bounded memory, and return whether it was accepted.

    Raises:
        Exception: whatever is not a `CfspError` of one line; `MemoryError` above the bound.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.is_file():
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, hard))
    try:
        read()
    except CfspError as error:
        assert "\n" not in str(error), str(error)
        return False
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    return True


def read_once(target: Target, data: bytes) -> bool:
    """Give one input to a target, in a directory of its own; return whether it was accepted."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as directory:
        return only_our_errors(lambda: target.read(data, Path(directory)))


# Plans.


def read_plan(data: bytes, directory: Path) -> object:
    """Read the input as a plan, and use what was read as others do."""
    (directory / "plan.json").write_bytes(data)
    plan = PruningPlan.load(directory / "plan.json")
    assert all(
        0 < kept <= unit.width for kept, unit in zip(plan.kept_widths, plan.units, strict=True)
    )
    again = PruningPlan.from_json(plan.to_json())
    assert again.units == plan.units
    return plan.ffn_sparsity


def plan_seeds() -> list[bytes]:
    """Return a plan of two blocks, one with experts, and one of a block that has two FFN units."""
    dense = (UnitPlan(0, 8, (0, 2, 7), 0.25, 0.5), UnitPlan(1, 8, tuple(range(8)), 0.5, 0.75))
    experts = (UnitPlan(0, 8, (0, 2, 9, 15), 0.25, 0.5, ffns=2, few_tokens={1: 3}),)
    mixed = (
        UnitPlan(1, 8, (0, 2, 9, 15), 0.25, 0.5, ffns=2, path="mlp.experts", cost=2),
        UnitPlan(1, 8, (0, 7), 0.25, 0.5, path="mlp.shared_expert"),
    )
    identity = ModelIdentity("a model", "llama", "0" * 32)
    criterion = {
        "block_metric": "angular",
        "channel_metric": "relative",
        "sparsity": 0.5,
        "of": "ffn",
        "multiple": 1,
    }
    calibration = {
        "windows": 4,
        "seqlen": 16,
        "sources": {"text": 4},
        "seed": 0,
        "dtype": "float32",
        "device": "cpu",
    }
    return [
        PruningPlan(identity, criterion, calibration, units).to_json().encode()
        for units in (dense, experts, mixed)
    ]


# Statistics.


def read_statistics(data: bytes, directory: Path) -> object:
    """Read statistics that an input describes: {"facts", "tensors": {name: [dtype, shape]}}."""
    path = directory / "statistics.safetensors"
    path.write_bytes(_file_from(data, _statistics_header))
    statistics = Statistics.load(path)
    statistics.save(directory / "again")
    return statistics.distance_L


def _statistics_header(described: dict[str, Any]) -> dict[str, Any]:
    header, end = {}, 0
    for name, (dtype, shape) in described["tensors"].items():
        start = end
        end += 8 * len(shape) if shape == [] else 8 * int(shape[0])
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return {"__metadata__": {_STATISTICS_KEY: json.dumps(described["facts"])}, **header}


def statistics_seeds() -> list[bytes]:
    """Return statistics of two blocks, of two with experts, and of two of which one has an FFN."""
    record = CalibrationRecord(
        "a model", "0" * 32, {"text": 4}, "1" * 64, 4, 16, 0, "float32", "cpu", False
    )
    seeds = []
    with tempfile.TemporaryDirectory() as directory:
        for number, units in enumerate(
            ((_unit(0), _unit(1)), (_unit(0, (40, 24)), _unit(1, (40, 24))), (_unit(1),))
        ):
            path = Path(directory) / f"{number}"
            blocks = (BlockStatistics(6.4, 64),) * 2
            Statistics(blocks, units, record).save(path)
            with safe_open(path, framework="pt") as file:
                facts = json.loads(file.metadata()[_STATISTICS_KEY])
                tensors = {name: ["F64", [8]] for name in file.keys()}  # noqa: SIM118
            seeds.append(json.dumps({"facts": facts, "tensors": tensors}).encode())
            seeds.append(path.read_bytes())
    return seeds


def _unit(block: int, routed: tuple[int, ...] = ()) -> UnitStatistics:
    return UnitStatistics(block, torch.ones(8).double(), 64, routed)


# Checkpoints: an index and the header of a shard.


def read_checkpoint(data: bytes, directory: Path) -> object:
    """Read weights that the input describes: {"index": ..., "header": ...}."""
    try:
        index: Any = json.dumps(json.loads(data)["index"]).encode()
    except (ValueError, KeyError, TypeError, RecursionError):
        index = json.dumps({"weight_map": {"weight": _SHARD}}).encode()
    (directory / INDEX_FILE).write_bytes(index)
    (directory / _SHARD).write_bytes(_file_from(data, lambda described: described["header"]))
    return [tensor.read() for tensor in read_weights(directory).values()]


def checkpoint_seeds() -> list[bytes]:
    """Return one tensor, several, and a whole file."""
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(3, dtype=torch.bfloat16)}
    seeds = [save({"weight": torch.ones(2, 3)})]
    for names in (["weight"], ["weight", "bias"]):
        whole = save({name: tensors[name] for name in names})
        length = int.from_bytes(whole[:8], "little")
        described = {
            "index": {"metadata": {}, "weight_map": dict.fromkeys(names, _SHARD)},
            "header": json.loads(whole[8 : 8 + length]),
        }
        seeds.append(json.dumps(described).encode())
    return seeds


# GGUF headers.


def read_gguf(data: bytes, directory: Path) -> object:
    """Read the input as a GGUF file."""
    (directory / "a.gguf").write_bytes(data)
    return gguf_reader(directory / "a.gguf")


def gguf_seeds() -> list[bytes]:
    """Return a header with values of every kind and one tensor."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("name") + struct.pack("<I", 8) + text("a model"),
        text("blocks") + struct.pack("<II", 4, 2),
        text("rope") + struct.pack("<Id", 12, 1e4),
        text("tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 0.5, 1.5),
    ]
    tensor = text("weight") + struct.pack("<IQQIQ", 2, 4, 4, 0, 0)
    whole = b"GGUF" + struct.pack("<IQQ", 3, 1, len(pairs)) + b"".join(pairs) + tensor
    return [whole + bytes(96), b"GGUF" + struct.pack("<IQQ", 2, 0, 0)]


# Common.


def _file_from(data: bytes, header_of: Callable[[dict[str, Any]], object]) -> bytes:
    """Return a safetensors file with the header that an input describes, or the input itself."""
    try:
        header = header_of(json.loads(data))
        entries = header.values() if isinstance(header, dict) else ()
        end = max((e["data_offsets"][1] for e in entries if "data_offsets" in e), default=0)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + bytes(max(0, min(end, _DATA_BYTES)))
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return data


TARGETS = {
    "plan": Target(read_plan, plan_seeds),
    "statistics": Target(read_statistics, statistics_seeds),
    "checkpoint": Target(read_checkpoint, checkpoint_seeds),
    "gguf": Target(read_gguf, gguf_seeds),
}

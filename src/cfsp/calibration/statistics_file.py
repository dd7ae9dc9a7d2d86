"""Statistics on disk: one file is one calibration.

It is `statistics.safetensors`: sums of channels as tensors, all else as JSON in its metadata.
What is read is checked, so that a damaged file is told from a calibration.

Shapes: E experts, F FFN channels, L blocks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cfsp.calibration.statistics import (
    NOT_SEEN,
    BlockStatistics,
    CalibrationRecord,
    Removal,
    RunDistances,
    Sensitivity,
    Statistics,
    UnitStatistics,
)
from cfsp.checkpoint.output import write_atomically
from cfsp.errors import StatisticsError
from cfsp.settings import DISTANCES, UNIT_PARTS, WHOLE_PARTS

STATISTICS_VERSION = 5
# Version 4 has the sum of each activation besides, which nothing is made from.
_READ = (4, STATISTICS_VERSION)
_METADATA_KEY = "cfsp_statistics"


def write_statistics(statistics: Statistics, path: Path) -> None:
    """Write statistics to one file, atomically; see `Statistics.save`."""
    tensors: dict[str, Tensor] = {}
    for i, unit in enumerate(statistics.units):
        tensors[f"units.{i}.sum_of_squares"] = unit.sum_of_squares_F.contiguous()
        if len(unit.output_norm_E):
            tensors[f"units.{i}.output_norm"] = unit.output_norm_E.contiguous()
    facts: dict[str, Any] = {
        "version": STATISTICS_VERSION,
        "record": asdict(statistics.record),
        "blocks": [asdict(block) for block in statistics.blocks],
        "units": list(map(_entry_of, statistics.units)),
    }
    if statistics.sensitivity:
        facts["sensitivity"] = statistics.sensitivity.to_json()
    if statistics.removals:
        facts["removals"] = [each.to_json() for each in statistics.removals]
    if statistics.runs:
        facts["runs"] = asdict(statistics.runs)
    # One entry only: the library writes several in random order, and the same statistics
    # shall give the same bytes.
    write_atomically(path, save(tensors, metadata={_METADATA_KEY: json.dumps(facts)}))


def read_statistics(path: Path) -> Statistics:
    """Read statistics from a file; see `Statistics.load`."""
    if not path.is_file():
        raise StatisticsError(f"{path} does not exist; make it with: cfsp calibrate MODEL")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StatisticsError(
            f"{path} is not a statistics file: {error}; make one with: cfsp calibrate MODEL"
        ) from error
    try:
        facts = json.loads(metadata[_METADATA_KEY])
        version = facts["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise StatisticsError(
            f"{path} is not a statistics file; make one with: cfsp calibrate MODEL"
        ) from error
    if version not in _READ:
        raise StatisticsError(
            f"{path} has statistics version {version}, expected {STATISTICS_VERSION}; "
            "calibrate again"
        )
    try:
        record = _record(facts["record"])
        blocks = tuple(_block(entry, i) for i, entry in enumerate(facts["blocks"]))
        units = tuple(_unit(entry, tensors, f"units.{i}") for i, entry in enumerate(facts["units"]))
        _check_order(units, len(blocks))
        sensitivity = sensitivity_from_json(facts.get("sensitivity"), len(blocks))
        removals = removals_from_json(facts.get("removals", ()), len(blocks))
        runs = _runs(facts.get("runs"), len(blocks))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise StatisticsError(f"{path} is damaged: {error!r}; calibrate again") from error
    if not blocks:
        raise StatisticsError(f"{path} describes no block; calibrate again")
    for i, block in enumerate(blocks):
        own = [unit for unit in units if unit.block == i]
        if not all(map(math.isfinite, block.distance_sums.values())) or not all(
            map(_is_possible, own)
        ):
            raise StatisticsError(
                f"{path} has NaN, infinite or impossible values in block {i}; calibrate again"
            )
    return Statistics(blocks, units, record, sensitivity, removals, runs)


def _entry_of(unit: UnitStatistics) -> dict[str, Any]:
    """Return what is written of a unit besides its sums."""
    entry: dict[str, Any] = {"block": unit.block, "tokens": unit.tokens}
    if unit.routed_E:
        entry["routed"] = unit.routed_E
    if unit.part != "ffn":
        entry["part"] = unit.part
    if unit.distance_sums:
        entry["distance_sums"] = unit.distance_sums
    return entry


def _record(fields: dict[str, Any]) -> CalibrationRecord:
    record = CalibrationRecord(**fields)
    for key, kind in CalibrationRecord.__annotations__.items():
        expected = {"str": str, "int": int, "bool": bool}.get(kind, dict)
        if type(getattr(record, key)) is not expected:
            raise TypeError(f"{key} is not of type {expected.__name__}")
    return record


def _runs(fields: dict[str, Any] | None, blocks: int) -> RunDistances | None:
    if fields is None:
        return None
    sums = tuple(tuple(float(value) for value in row) for row in fields["sums"])
    if [len(row) for row in sums] != [blocks + 1] * (blocks + 1) or int(fields["tokens"]) < 1:
        raise ValueError(f"the distances over runs are not those of {blocks} blocks")
    if not all(math.isfinite(value) for row in sums for value in row):
        raise ValueError("the distances over runs are NaN or infinite")
    return RunDistances(sums, int(fields["tokens"]))


def _block(entry: dict[str, Any], index: int) -> BlockStatistics:
    tokens = int(entry["tokens"])
    if tokens < 1:
        raise ValueError(f"block {index} has seen {tokens} tokens")
    sums = {name: float(entry["distance_sums"][name]) for name in DISTANCES}
    return BlockStatistics(sums, tokens)


def _unit(entry: dict[str, Any], tensors: dict[str, Tensor], name: str) -> UnitStatistics:
    squares_F = tensors[f"{name}.sum_of_squares"]
    if squares_F.ndim != 1:
        raise ValueError(f"{name} has sums of shape {squares_F.shape}")
    block, tokens = int(entry["block"]), int(entry["tokens"])
    if tokens < 1:
        raise ValueError(f"{name} has seen {tokens} tokens")
    routed_E = tuple(int(seen) for seen in entry.get("routed", ()))
    if routed_E and (min(routed_E) < 0 or len(squares_F) % len(routed_E)):
        raise ValueError(f"{name} has {len(squares_F)} channels in {len(routed_E)} experts")
    output_norm_E = tensors.get(f"{name}.output_norm", NOT_SEEN).double()
    if len(output_norm_E) not in (0, len(routed_E)):
        raise ValueError(f"{name} has outputs of {len(output_norm_E)} experts")
    part = entry.get("part", "ffn")
    if part not in UNIT_PARTS:
        raise ValueError(f"{name} is of the part {part!r}")
    sums = entry.get("distance_sums", {})
    distance_sums = {distance: float(sums[distance]) for distance in DISTANCES if sums}
    return UnitStatistics(
        block,
        squares_F.double(),
        tokens,
        routed_E,
        part,
        distance_sums,
        output_norm_E,
    )


def _check_order(units: Sequence[UnitStatistics], blocks: int) -> None:
    order = [unit.block for unit in units]
    if order != sorted(order) or not all(0 <= block < blocks for block in order):
        raise ValueError(f"the FFNs of {blocks} blocks are said to be in blocks {order}")


def _is_possible(unit: UnitStatistics) -> bool:
    if not all(map(math.isfinite, unit.distance_sums.values())):
        return False
    if not bool(torch.isfinite(unit.output_norm_E).all()) or bool((unit.output_norm_E < 0).any()):
        return False
    squares_F = unit.sum_of_squares_F
    return bool(torch.isfinite(squares_F).all()) and bool((squares_F >= 0).all())


def sensitivity_from_json(fields: dict[str, Any] | None, blocks: int) -> Sensitivity | None:
    """Return the sensitivity whose fields were written as JSON; None where there are none.

    Args:
        fields: its fields.
        blocks: how many blocks the model has.

    Raises:
        ValueError: the values cannot be those of so many blocks.
    """
    return None if fields is None else _sensitivity(fields, blocks)


def _sensitivity(fields: dict[str, Any], blocks: int) -> Sensitivity:
    divergence_L = tuple(map(float, fields["divergence_L"]))
    kept_L = tuple(map(float, fields["kept_L"]))
    if not (
        len(divergence_L) == len(kept_L) == blocks
        and all(0 <= value < math.inf for value in divergence_L)
        and all(0 < share <= 1 for share in kept_L)
    ):
        raise ValueError(f"the sensitivity of {blocks} blocks is {divergence_L}, kept {kept_L}")
    others = {str(part): _sensitivity(each, blocks) for part, each in fields["other_parts"].items()}
    return Sensitivity(divergence_L, kept_L, int(fields["windows"]), others)


def removals_from_json(fields: Sequence[dict[str, Any]], blocks: int) -> tuple[Removal, ...]:
    """Return the removals whose fields were written as JSON.

    Args:
        fields: their fields.
        blocks: how many blocks the model has.

    Raises:
        ValueError: they cannot be those of so many blocks.
    """
    found = tuple(
        Removal(
            int(each["block"]),
            float(each["divergence"]),
            each.get("part", "blocks"),
            tuple(each.get("among", ())),
        )
        for each in fields
    )
    places = {(each.among, each.part, each.block) for each in found}
    possible = {
        (among, part, block)
        for among in ((), WHOLE_PARTS)
        for part in WHOLE_PARTS
        for block in range(blocks)
    }
    if len(places) < len(found) or not places <= possible:
        raise ValueError(f"of {blocks} blocks those that go are {sorted(places)}")
    return found

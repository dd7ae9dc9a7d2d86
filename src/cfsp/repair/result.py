"""A decision with its repairs, as a value, and what each repair did, as it is in a manifest.

Each step (`cfsp.repair.ladder`) takes a `PruningResult` and returns one with a step more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from cfsp.calibration.observed import CalibrationRecord
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.tensor_file import (
    FileTensor,
    MadeTensor,
    read_tensor_file,
    write_tensor_file,
)
from cfsp.planning.plan_file import PruningPlan


class BlockRepair(TypedDict):
    """What a step did with a block, or an FFN unit of it."""

    # Index of the block, and path from it to the unit that this stands for, in a model whose blocks
    # have several FFN units.
    block: NotRequired[int]
    path: NotRequired[str]
    # How far it was from the dense model on held-out windows: of `ridge` the relative squared
    # error of the FFN's output, else the relative error of hidden states.
    error_before: float
    error_after: float
    kept: bool  # new weights are rejected where held-out windows are no better for them
    strength: float | None  # the ridge that was chosen, of experts the median; None if none was
    loss_before: float | None  # what held-out windows were judged by, where that is not the error
    loss_after: float | None
    few_tokens: NotRequired[list[int]]  # experts that saw too few tokens to be repaired, if any


class Step(TypedDict):
    """What one step of the ladder did."""

    name: str
    # With each block; None where it has nothing to fit. Where blocks have several FFN units, with
    # each unit.
    blocks: list[BlockRepair | None]


def rejected_blocks(step: Mapping[str, Any]) -> list[str]:
    """Return the blocks or FFNs that a step in JSON left as they were, for it did not help."""
    return [
        f"{entry['block']} {entry['path']}".rstrip() if "block" in entry else str(index)
        for index, entry in enumerate(step["blocks"])
        # Where nothing was cut nothing was lost: no weights were tried there.
        if entry is not None and not entry["kept"] and entry["error_before"] > 0
    ]


@dataclass(frozen=True)
class PruningResult:
    """All that the cut needs."""

    plan: PruningPlan
    statistics: Statistics | None = None  # of the calibration; None where a plan was given
    # The files with repaired tensors, by the tensors' names.
    tensors: Mapping[str, FileTensor] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()  # what repaired them, in order
    repaired_on: CalibrationRecord | None = None  # what these read, if anything


def write_tensors(directory: Path, block: int, tensors: Mapping[str, Tensor]) -> None:
    """Write new tensors of a block."""
    made = {name: MadeTensor.of(tensor) for name, tensor in tensors.items()}
    write_tensor_file(_tensors_path(directory, block), made)


def _tensors_path(directory: Path, block: int) -> Path:
    return directory / f"repaired-{block:05d}.safetensors"


def add_step(
    repaired: PruningResult,
    name: str,
    directory: Path,
    repairs: Sequence[Sequence[BlockRepair | None]],
) -> PruningResult:
    """Return what a step makes of what was there before it.

    It wrote new tensors into a directory, of each block with any that it kept; `repairs` are what
    it did with the units of each block, or with each block.
    """
    tensors = dict(repaired.tensors)
    for block, of_block in enumerate(repairs):
        if any(repair is not None and repair["kept"] for repair in of_block):
            tensors |= read_tensor_file(_tensors_path(directory, block))
    step: Step = {"name": name, "blocks": [repair for of_block in repairs for repair in of_block]}
    return replace(repaired, tensors=tensors, steps=(*repaired.steps, step))

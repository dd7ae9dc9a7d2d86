"""A decision with its repairs, as a value, and what each repair did.

Each step (`cfsp.repair.ladder`) takes a `PruningResult` and returns one with a step more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.tensor_file import (
    FileTensor,
    outgoing_tensor,
    read_tensor_file,
    write_tensor_file,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.calibration.statistics import Statistics
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.streaming.two_streams import Judgement


@dataclass(frozen=True)
class ExpertRepair:
    """What a step did with one expert of a block."""

    # Relative squared error of its output on held-out tokens, which never becomes larger.
    error_before: float
    error_after: float
    # Whether the new weights were kept.
    kept: bool
    # The ridge that was chosen; None if the expert stays as it was.
    strength: float | None
    # Whether it stays as it was because it saw too few tokens.
    few_tokens: bool


@dataclass(frozen=True)
class BlockRepair:
    """What a step did with a block, an FFN unit of it, or blocks that changed together."""

    # How many they are; the last is the one that this stands for.
    blocks: int
    # How far they were from the dense model on held-out windows: of `ridge` the relative squared
    # error of the FFN's output, else the relative error of hidden states.
    error_before: float
    error_after: float
    # New weights are rejected where held-out windows are no better for them.
    kept: bool
    # The ridge that was chosen, of experts the median; None if none was.
    strength: float | None = None
    # 0 of a least-squares fit.
    training_steps: int = 0
    # What held-out windows were judged by, where that is not the error.
    loss_before: float | None = None
    loss_after: float | None = None
    # Of a unit that has experts, what was done with each.
    experts: tuple[ExpertRepair, ...] = ()
    # Index of the block, and path from it to the unit that this stands for, in a model whose blocks
    # have several FFN units.
    block: int | None = None
    path: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        fields = asdict(self)
        experts = fields.pop("experts")
        place = {key: value for key in ("block", "path") if (value := fields.pop(key)) is not None}
        return place | fields | ({"experts": list(experts)} if experts else {})

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> BlockRepair:
        """Return what `to_json` made."""
        experts = tuple(ExpertRepair(**expert) for expert in fields.get("experts", ()))
        return BlockRepair(**{**fields, "experts": experts})


@dataclass(frozen=True)
class Step:
    """What one step of the ladder did."""

    name: str
    # With each block; None where a later block speaks for it, or where it has no FFN. Where blocks
    # have several FFN units, with each unit.
    blocks: tuple[BlockRepair | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        blocks = [None if block is None else block.to_json() for block in self.blocks]
        return {"name": self.name, "blocks": blocks}


def entry_name(entry: Mapping[str, Any], index: int) -> str:
    """Return what an entry of a step in JSON is about: its block, and the path in that if any."""
    return f"{entry['block']} {entry['path']}".rstrip() if "block" in entry else str(index)


def was_rejected(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of a step in JSON says that new weights did not help.

    Where nothing was cut nothing was lost: no weights were tried there.
    """
    return not entry["kept"] and entry["error_before"] > 0


def rejected_blocks(step: Mapping[str, Any]) -> list[str]:
    """Return the blocks or FFNs that a step in JSON left as they were, for it did not help."""
    return [
        entry_name(entry, index)
        for last, entry in enumerate(step["blocks"])
        if entry is not None and was_rejected(entry)
        for index in range(last + 1 - entry["blocks"], last + 1)
    ]


@dataclass(frozen=True)
class PruningResult:
    """All that the cut needs."""

    plan: PruningPlan
    # Of the calibration; None where a plan was given.
    statistics: Statistics | None = None
    # The files with repaired tensors, by the tensors' names.
    tensors: Mapping[str, FileTensor] = field(default_factory=dict)
    # What repaired them, in order.
    steps: tuple[Step, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return what the steps did, for the manifest."""
        return {"steps": [step.to_json() for step in self.steps]}


def block_repair(
    blocks: int,
    before: Judgement,
    after: Judgement | None,
    *,
    strength: float | None = None,
    training_steps: int = 0,
) -> BlockRepair:
    """Return what a step on the pruned stream did with so many blocks.

    `before` and `after` say how far they are from the dense model; after is None if the new weights
    were rejected.
    """
    left = before if after is None else after
    return BlockRepair(
        blocks,
        before.error,
        left.error,
        after is not None,
        strength,
        training_steps,
        before.loss,
        left.loss,
    )


def write_tensors(directory: Path, block: int, tensors: Mapping[str, Tensor]) -> None:
    """Write new tensors of a block, or of blocks of which it is the last."""
    path = _tensors_path(directory, block)
    write_tensor_file(path, [outgoing_tensor(name, tensor) for name, tensor in tensors.items()])


def new_tensors(directory: Path, block: int) -> dict[str, FileTensor]:
    """Return what `write_tensors` wrote."""
    return read_tensor_file(_tensors_path(directory, block))


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
        if any(repair is not None and repair.kept for repair in of_block):
            tensors |= new_tensors(directory, block)
    step = Step(name, tuple(repair for of_block in repairs for repair in of_block))
    return replace(repaired, tensors=tensors, steps=(*repaired.steps, step))

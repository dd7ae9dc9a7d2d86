"""What local reconstruction did with blocks that it trained together, and where that is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.tensor_file import TensorFile, outgoing_tensor, write_tensor_file


@dataclass(frozen=True)
class HeldOut:
    """How far blocks are from the dense model, on held-out windows of the pruned stream.

    Attributes:
        error: of the last block's output hidden states, relative to the dense stream (see
            `token_error`).
        loss: what training lowers: see `hidden_loss`; after the model's last block, see
            `HeadDivergence`.
    """

    error: float
    loss: float

    @property
    def is_finite(self) -> bool:
        """Whether both are numbers."""
        return math.isfinite(self.error) and math.isfinite(self.loss)


@dataclass(frozen=True)
class ReconstructedBlocks:
    """How the reconstruction of blocks that were trained together went.

    Attributes:
        blocks: how many they are; the last is the one that this stands for.
        before: as they were before.
        after: after training; None if that was no number.
        steps: of training.
        file: holds the trained tensors under their names in the model; None if the blocks were
            no better for training and stay as they were.
    """

    blocks: int
    before: HeldOut
    after: HeldOut | None
    steps: int
    file: TensorFile | None

    def to_json(self) -> dict[str, Any]:
        """Return the errors, the steps, and whether the blocks were better for them."""
        after = self.after
        return {
            "blocks": self.blocks,
            "error_before": self.before.error,
            "error_after": None if after is None else after.error,
            "loss_before": self.before.loss,
            "loss_after": None if after is None else after.loss,
            "steps": self.steps,
            "is_better": self.file is not None,
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any], file: TensorFile) -> ReconstructedBlocks:
        """Return what `to_json` came from; the file is left out if the blocks were no better."""
        after = None
        if fields["error_after"] is not None:
            after = HeldOut(fields["error_after"], fields["loss_after"])
        return ReconstructedBlocks(
            fields["blocks"],
            HeldOut(fields["error_before"], fields["loss_before"]),
            after,
            fields["steps"],
            file if fields["is_better"] else None,
        )


class ReconstructedFiles:
    """Keeps what the pass did in a block beside the tensors, which are there already.

    A block that is not the last of those that train together has nothing to keep.
    """

    def save(self, result: ReconstructedBlocks | None, directory: Path, block: int) -> None:
        """Write the facts of one block."""
        facts = None if result is None else result.to_json()
        write_atomically(_facts_path(directory, block), json.dumps(facts).encode())

    def load(self, directory: Path, block: int) -> ReconstructedBlocks | None:
        """Read the facts of one block."""
        facts = json.loads(_facts_path(directory, block).read_text(encoding="utf-8"))
        if facts is None:
            return None
        return ReconstructedBlocks.from_json(facts, TensorFile(_tensor_path(directory, block)))


def write_trained(directory: Path, block: int, tensors: Mapping[str, Tensor]) -> TensorFile:
    """Write the trained tensors of the blocks of which this one is the last."""
    path = _tensor_path(directory, block)
    write_tensor_file(path, [outgoing_tensor(name, tensor) for name, tensor in tensors.items()])
    return TensorFile(path)


def _facts_path(directory: Path, block: int) -> Path:
    return directory / f"reconstructed-{block:05d}.json"


def _tensor_path(directory: Path, block: int) -> Path:
    return directory / f"reconstructed-{block:05d}.safetensors"

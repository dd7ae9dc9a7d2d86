"""What repair against the dense stream did with blocks, and where that is kept."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.tensor_file import TensorFile, outgoing_tensor, write_tensor_file
from cfsp.errors import CalibrationError


@dataclass(frozen=True)
class HeldOut:
    """How far blocks are from the dense model, on held-out windows of the pruned stream.

    Attributes:
        error: of the last block's output hidden states, relative to the dense stream (see
            `token_error`).
        loss: what is to become less: see `hidden_loss`; after the model's last block, see
            `HeadLoss`.
    """

    error: float
    loss: float

    @property
    def is_finite(self) -> bool:
        """Whether both are numbers."""
        return math.isfinite(self.error) and math.isfinite(self.loss)

    def check_finite(self, block: int) -> None:
        """Check that a block computes numbers as it is.

        Raises:
            CalibrationError: it does not.
        """
        if not self.is_finite:
            raise CalibrationError(
                f"block {block} produced NaN or infinite activations; "
                "prune with --dtype float32 or bfloat16"
            )


@dataclass(frozen=True)
class ReconstructedBlocks:
    """How it went with blocks that were repaired together.

    Attributes:
        blocks: how many they are; the last is the one that this stands for.
        before: as they were before.
        after: with the new weights; None if that was no number.
        steps: of training; 0 of a least-squares fit.
        file: holds the new tensors under their names in the model; None if the blocks were no
            better for them and stay as they were.
        ridge: the strength that was chosen for a least-squares fit; None if none was better, or
            there was none.
    """

    blocks: int
    before: HeldOut
    after: HeldOut | None
    steps: int
    file: TensorFile | None
    ridge: float | None = None

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
            "ridge": self.ridge,
            "is_better": self.file is not None,
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any], file: TensorFile | None) -> ReconstructedBlocks:
        """Return what `to_json` came from.

        Args:
            fields: what it returned.
            file: if the blocks were better for their new tensors.
        """
        after = None
        if fields["error_after"] is not None:
            after = HeldOut(fields["error_after"], fields["loss_after"])
        return ReconstructedBlocks(
            fields["blocks"],
            HeldOut(fields["error_before"], fields["loss_before"]),
            after,
            fields["steps"],
            file,
            fields["ridge"],
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
        file = TensorFile(_tensor_path(directory, block)) if facts["is_better"] else None
        return ReconstructedBlocks.from_json(facts, file)


def write_trained(directory: Path, block: int, tensors: Mapping[str, Tensor]) -> TensorFile:
    """Write the trained tensors of the blocks of which this one is the last."""
    path = _tensor_path(directory, block)
    write_tensor_file(path, [outgoing_tensor(name, tensor) for name, tensor in tensors.items()])
    return TensorFile(path)


def say_what_was_left_alone(results: Sequence[ReconstructedBlocks | None]) -> None:
    """Name the blocks that stay as they were."""
    alone = [
        str(block)
        for last, result in enumerate(results)
        if result is not None and result.file is None
        for block in range(last - result.blocks + 1, last + 1)
    ]
    if alone:
        print(
            f"blocks {', '.join(alone)} stay as they were before: on held-out windows training "
            "did not make them better",
            file=sys.stderr,
        )


def _facts_path(directory: Path, block: int) -> Path:
    return directory / f"reconstructed-{block:05d}.json"


def _tensor_path(directory: Path, block: int) -> Path:
    return directory / f"reconstructed-{block:05d}.safetensors"

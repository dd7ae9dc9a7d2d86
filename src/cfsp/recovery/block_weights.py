"""What a pruned checkpoint says of its blocks: the numbers that ranks follow.

Shapes: L blocks.
"""

from __future__ import annotations

from cfsp.checkpoint.own_files import PLAN_FILE
from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import PlanError, RecoveryError
from cfsp.planning.plan_file import PruningPlan
from cfsp.recovery.adaptation import Adaptation
from cfsp.result.manifest import read_manifest
from cfsp.result.repair_steps import repair_steps


def block_weights(source: Checkpoint, adaptation: Adaptation) -> list[float]:
    """Return a number for every block, which its rank is to follow; ones if none is needed.

    Raises:
        RecoveryError: the checkpoint does not hold what the adaptation asks for.
        PlanError: its plan is for another number of blocks.
    """
    blocks = int(source.config.num_hidden_layers)
    if adaptation.method == "full" or adaptation.allocation == "uniform":
        return [1.0] * blocks
    if adaptation.allocation == "error":
        return _restored_errors(source, blocks)
    return _importances(source, blocks)


def _importances(source: Checkpoint, blocks: int) -> list[float]:
    """Return the normalised coarse importance of every block, from the plan."""
    path = source.directory / PLAN_FILE
    if not path.is_file():
        raise RecoveryError(
            f"{source.label} was not pruned by cfsp: it has no {PLAN_FILE} with the importance of "
            "its blocks; recover it with --rank-allocation uniform"
        )
    plan = PruningPlan.load(path)
    if len(plan.blocks) != blocks:
        raise PlanError(
            f"{path} describes {len(plan.blocks)} blocks, the model has {blocks}; "
            "recover it with --rank-allocation uniform"
        )
    return [block.importance for block in plan.blocks]


def _restored_errors(source: Checkpoint, blocks: int) -> list[float]:
    """Return what restoration left of the error of every block's FFN, from the manifest."""
    steps = repair_steps(read_manifest(source.directory) or {})
    errors_L = [
        float(block["error_after" if block["kept"] else "error_before"])
        for step in steps[:1]
        for block in step["blocks"]
    ]
    if len(errors_L) != blocks:
        raise RecoveryError(
            f"{source.label} was not restored by cfsp: its manifest has the restored error of "
            f"{len(errors_L)} blocks, expected {blocks}; recover it with another --rank-allocation"
        )
    return errors_L

"""The ridge repair as a step of the ladder: by a plan, or of what the pass chose itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfsp.repair import ridge_pass
from cfsp.repair.repaired import add_step
from cfsp.repair.ridge_pass import ChosenBlock, choose_and_repair

if TYPE_CHECKING:
    from cfsp.job import Job
    from cfsp.repair.repaired import Repaired
    from cfsp.text.windows import Windows


def repair_by_plan(job: Job, result: Repaired, windows: Windows) -> Repaired:
    """Repair what a plan leaves, in one pass over all windows.

    Args:
        job: what is pruned.
        result: the plan, and the statistics that it was made from if they are there.
        windows: the calibration windows.
    """
    plan = result.plan
    widths = ((unit.kept_width, unit.width) for unit in plan.kept_units)
    if plan.has_gaps and all(kept in (0, width) for kept, width in widths):
        return result
    kept = plan.kept_channels
    chosen = choose_and_repair(
        job.source,
        windows,
        lambda unit, _: kept[unit],
        job.engine,
        job.place,
        removed=plan.removed_blocks,
    )
    return with_ridge(result, chosen)


def with_ridge(repaired: Repaired, chosen: Sequence[ChosenBlock]) -> Repaired:
    """Add the step to a decision.

    Args:
        repaired: without it.
        chosen: what the pass did, block by block.
    """
    if any(len(block.repaired) > 1 for block in chosen):
        units = [unit for block in chosen for unit in block.repaired or (None,) * len(block.kept)]
        return add_step(repaired, ridge_pass.NAME, units)
    blocks = [block.repaired[0] if block.repaired else None for block in chosen]
    return add_step(repaired, ridge_pass.NAME, blocks)

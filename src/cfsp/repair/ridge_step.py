"""The ridge repair as a step of the ladder: by a plan, or of what the pass chose itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cfsp.repair import ridge_pass
from cfsp.repair.repaired import Repaired, add_step
from cfsp.repair.ridge_pass import ChosenBlock, choose_and_repair

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.text.windows import Windows


def repair_by_plan(
    source: WeightSource,
    plan: PruningPlan,
    statistics: Statistics | None,
    windows: Windows,
    engine: Engine,
    place: Workplace,
) -> Repaired:
    """Repair what a plan leaves, in one pass over all windows.

    Arguments and errors are those of `plan_and_repair`, but for `windows`, the calibration windows.
    """
    widths = ((unit.kept_width, unit.width) for unit in plan.kept_units)
    if plan.has_gaps and all(kept in (0, width) for kept, width in widths):
        return Repaired(plan, statistics)
    kept = plan.kept_channels
    chosen = choose_and_repair(
        source,
        windows,
        lambda unit, _: kept[unit],
        engine,
        place,
        removed=plan.removed_blocks,
    )
    return with_ridge(Repaired(plan, statistics), chosen)


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

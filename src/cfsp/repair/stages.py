"""Single stages of the flow, for one model on this machine: calibrate, measure sensitivity, plan.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cfsp.calibration.calibrate import calibrate
from cfsp.planning.coarse import SENSITIVITY_METRICS
from cfsp.planning.make import BlockWidths, Criterion, make_plan, warn_of_few_tokens
from cfsp.progress import item_progress
from cfsp.text.windows import few_windows
from cfsp.whole_model.load import measure_sensitivity

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Statistics
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.workplace import Workplace
    from cfsp.planning.allocation import Budget
    from cfsp.planning.plan_file import PruningPlan
    from cfsp.settings import Engine
    from cfsp.text.windows import Windows

# The divergence of a pruned block has little noise (LOG.md), and each window costs half a forward
# pass for every block.
SENSITIVITY_WINDOWS = 4


def calibrate_windows(
    source: WeightSource,
    windows: Windows,
    engine: Engine,
    seed: int,
    place: Workplace | None = None,
    name: str = "calibrate",
) -> Statistics:
    """Run the windows through the model once; see `calibrate`."""
    return calibrate(
        source,
        windows,
        device=engine.device,
        dtype=engine.dtype,
        seed=seed,
        batch_windows=engine.batch_windows,
        place=place,
        name=name,
    )


def with_sensitivity(
    source: WeightSource,
    statistics: Statistics,
    windows: Windows,
    criterion: Criterion,
    engine: Engine,
) -> Statistics:
    """Measure the sensitivity of blocks on a few windows, if the criterion takes it."""
    if criterion.block_metric not in SENSITIVITY_METRICS:
        return statistics
    few = few_windows(windows, SENSITIVITY_WINDOWS)
    found = measure_sensitivity(source, statistics, few, criterion, engine)
    return replace(statistics, sensitivity=found)


def plan_from_statistics(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    widths: BlockWidths | None = None,
) -> PruningPlan:
    """Make a plan from statistics, showing progress; see `make_plan`."""
    with item_progress("plan", source.config.num_hidden_layers, "block") as bar:
        plan = make_plan(source, statistics, budget, criterion, on_block=bar.update, widths=widths)
    warn_of_few_tokens(plan)
    return plan

"""Planning: from statistics to a plan, in seconds, without a forward pass.

what goes whole (`removal`) -> how many channels units keep (`widths`) -> which (`channels`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from cfsp.calibration.statistics import Statistics, UnitStatistics
from cfsp.checkpoint.reading import EARLIER, WeightSource, fingerprint
from cfsp.engine.block_proof import check_experts_can_go
from cfsp.errors import StatisticsError
from cfsp.planning.channels import channels_that_stay, few_tokens, warn_of_few_tokens
from cfsp.planning.experts import lost_output, warn_of_lost_experts
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.removal import whole_removal
from cfsp.planning.removal_budget import RemovedWhole
from cfsp.planning.unit_plan import UnitPlan
from cfsp.planning.widths import UnitWidths, definite_criterion, model_size, plan_widths
from cfsp.progress import item_progress
from cfsp.settings import DEFAULT_PARTS, Budget, Criterion


def make_plan(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    on_unit: Callable[[], object] = lambda: None,
) -> PruningPlan:
    """Decide which blocks and channels stay.

    Args:
        source: the model; its FFN weights are read one unit at a time.
        statistics: its calibration.
        budget: how much to remove.
        criterion: what counts as important.
        on_unit: is called after each FFN unit.

    Raises:
        StatisticsError: the statistics belong to another model.
        BudgetError: the budget can't be met.
        UsageError: a metric is unknown.
    """
    check_statistics_fit(source, statistics)
    criterion = definite_criterion(criterion, statistics, budget)
    removed = whole_removal(source, statistics, budget, criterion.removal)
    widths = plan_widths(source, statistics, budget, criterion, removed)
    kept = []
    for kept_K in channels_that_stay(source, statistics, widths, criterion, removed):
        kept.append(kept_K)
        on_unit()
    return assemble_plan(source, statistics, budget, criterion, widths, kept, removed)


def assemble_plan(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    widths: UnitWidths,
    kept: Sequence[tuple[int, ...]],
    removed: RemovedWhole,
) -> PruningPlan:
    """Return the plan that widths and channels amount to, and what goes whole."""
    criterion = definite_criterion(criterion, statistics, budget)
    size = model_size(source)
    has_one_ffn_each = statistics.has_one_unit_each and not source.architecture.has_attentions
    units = [
        _without_gone_experts(
            UnitPlan(
                block=unit.block,
                width=unit.width,
                kept=kept_K,
                distance=distance,
                importance=importance,
                ffns=observed.ffns,
                few_tokens=few_tokens(observed),
                path="" if has_one_ffn_each else unit.path,
                cost=cost,
                part=unit.part,
            ),
            observed,
        )
        for unit, observed, kept_K, distance, importance, cost in zip(
            source.units,
            statistics.units,
            kept,
            widths.distance_U,
            widths.importance_U,
            size.cost_U,
            strict=True,
        )
    ]
    plan = PruningPlan(
        model=ModelIdentity.of(source),
        criterion={
            **_written(criterion, budget),
            "clamp": criterion.chosen_clamp,
            "sparsity": budget.sparsity,
            "of": _counted_part(budget),
            # Of which all new FFN widths are multiples.
            "multiple": math.gcd(*size.of_parts(("ffn",)).multiple_U(budget)) or 1,
            **({} if budget.parts == DEFAULT_PARTS else {"parts": list(budget.parts)}),
        },
        calibration=asdict(statistics.record),
        units=tuple(units),
        removed_blocks=removed.blocks,
    )
    if plan.kept_experts is not None:
        check_experts_can_go(source, plan.experts_of_blocks, plan.removed_blocks)
    return plan


def _counted_part(budget: Budget) -> str:
    """Return what the sparsity of a budget is a share of."""
    if budget.of != "ffn" or budget.removes_channels:
        return budget.of
    # An attention is a part of its block.
    return "blocks" if budget.removes_blocks else budget.parts[0]


def _without_gone_experts(unit: UnitPlan, observed: UnitStatistics) -> UnitPlan:
    """Return the plan of a unit that says what the experts added that go whole, if some do."""
    if not unit.loses_experts:
        return unit
    return replace(unit, lost_output=round(lost_output(observed, unit.kept_ffns), 6))


def _written(criterion: Criterion, budget: Budget) -> dict[str, Any]:
    """Return what a plan says of a criterion; of removal only where something may go whole."""
    fields = asdict(criterion)
    if not budget.whole_parts:
        del fields["removal"]
    return fields


def check_statistics_fit(source: WeightSource, statistics: Statistics) -> None:
    """Check that statistics belong to a model.

    Raises:
        StatisticsError: they belong to another one.
    """
    found = fingerprint(source)
    shapes = [(unit.block, unit.part, unit.ffns, unit.width) for unit in statistics.units]
    expected = [(unit.block, unit.part, unit.ffns, unit.columns) for unit in source.units]
    have, need = ({unit.part for unit in of.units} for of in (statistics, source))
    if statistics.record.fingerprint == found and have != need:
        raise StatisticsError(
            f"the statistics are of the parts {', '.join(sorted(have))}, expected "
            f"{', '.join(sorted(need))}; calibrate with the same --parts"
        )
    if statistics.record.fingerprint == found and any(
        unit.expert_axes and not len(seen.output_norm_E)
        for unit, seen in zip(source.units, statistics.units, strict=False)
    ):
        raise StatisticsError(
            "the statistics do not have what the experts add; calibrate with the same --parts"
        )
    if statistics.record.fingerprint != found or shapes != expected:
        raise StatisticsError(
            f"the statistics were made for {statistics.record.model} "
            f"({statistics.record.fingerprint}), not for {source.label} ({found}), "
            f"{EARLIER} them; calibrate this model"
        )


def plan_from_statistics(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
) -> PruningPlan:
    """Make a plan from statistics, showing progress; see `make_plan`."""
    with item_progress("plan", len(source.units), "FFN") as bar:
        plan = make_plan(source, statistics, budget, criterion, on_unit=bar.update)
    warn_of_few_tokens(plan)
    warn_of_lost_experts(plan)
    return plan

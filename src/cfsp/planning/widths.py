"""How many channels every unit keeps, from statistics and a budget.

What goes whole is decided before; the rest is planned as if it were the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import WeightSource, ffn_parameters_per_channel, parameter_count
from cfsp.planning.allocation import ModelSize, UnitSize, allocate
from cfsp.planning.coarse import importance_of_units
from cfsp.planning.removal import definite_removal
from cfsp.planning.removal_budget import RemovedWhole, WholeSizes, parameters_with_experts
from cfsp.settings import AUTO_METRIC, SENSITIVITY, UNIFORM, Budget, Criterion

# torch multiplies experts in groups only if rows are whole 16 bytes: 8 values of 16 bits.
EXPERTS_GRAIN = 8

NOTHING = RemovedWhole()


def model_size(source: WeightSource, removed: RemovedWhole = NOTHING) -> ModelSize:
    """Return the numbers of a model that budgets of channels are about.

    Args:
        source: the model.
        removed: what goes whole, which does not count.
    """
    parameters = parameter_count(source) - parameters_with_experts(source, removed.experts)
    if removed.parts:
        sizes = WholeSizes.of(source, removed.parts, removed.experts)
        parameters -= sizes.parameters(removed)
    return ModelSize(
        units=tuple(
            UnitSize(
                width=unit.width,
                channel_parameters=each // unit.ffns * (unit.ffns - removed.experts)
                if unit.expert_axes
                else each,
                kind=unit.path,
                grain=EXPERTS_GRAIN if unit.routed else 1,
                part=unit.part,
            )
            for unit, each in zip(source.units, ffn_parameters_per_channel(source), strict=True)
            if not removed.takes(unit)
        ),
        parameters=parameters,
    )


def definite_criterion(criterion: Criterion, statistics: Statistics, budget: Budget) -> Criterion:
    """Return a criterion that names its metrics: of `auto` what the statistics allow."""
    removal = definite_removal(criterion.removal, statistics, budget)
    criterion = replace(criterion, removal=removal)
    if budget.widths == "equal":
        return replace(criterion, block_metric=UNIFORM)
    if criterion.block_metric != AUTO_METRIC:
        return criterion
    return replace(criterion, block_metric=SENSITIVITY if statistics.sensitivity else "angular")


@dataclass(frozen=True)
class UnitWidths:
    """The coarse half of a decision: how many channels every unit keeps, and why.

    Attributes:
        distance_U: coarse distance of every unit's block.
        importance_U: normalised importance, in (0, 1]; 0 of what goes whole.
        kept_U: channels that stay in each FFN; 0 of what goes whole.
    """

    distance_U: list[float]
    importance_U: list[float]
    kept_U: list[int]


def plan_widths(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    removed: RemovedWhole,
) -> UnitWidths:
    """Decide how many channels every unit keeps.

    Args:
        source: the model.
        statistics: of all its blocks.
        budget: how much to remove.
        criterion: what counts as important.
        removed: what goes whole; the rest is planned as if it were the model.

    Raises:
        BudgetError: the budget can't be met.
        StatisticsError: the block metric requires a sensitivity, and the statistics have none.
        UsageError: a metric is unknown.
    """
    criterion = definite_criterion(criterion, statistics, budget)
    size = model_size(source, removed)
    staying = statistics
    if removed.parts:
        staying = statistics.without_attentions(removed.attentions).without_blocks(removed.blocks)
    distance_U, importance_U = importance_of_units(
        staying, criterion.block_metric, size, budget.parts
    )
    kept_U = size.width_U
    if budget.removes_channels:
        budget = budget_of_channels(source, budget, size)
        kept_U = allocate(importance_U, budget, size, criterion.chosen_clamp)
    if not removed.parts:
        return UnitWidths(distance_U, importance_U, kept_U)
    block_L = statistics.distances("angular")
    attention_L = statistics.of_part("kv").distances("angular")
    planned = zip(distance_U, importance_U, kept_U, strict=True)
    rows = []
    for unit in source.units:
        if removed.takes(unit):
            alone = unit.block in removed.attentions
            rows.append(((attention_L if alone else block_L)[unit.block], 0.0, 0))
        else:
            rows.append(next(planned))
    return UnitWidths(*(list(column) for column in zip(*rows, strict=True)))


def budget_of_channels(source: WeightSource, budget: Budget, size: ModelSize) -> Budget:
    """Return what a budget removes of the channels of a model without what goes whole.

    Of a share of all parameters, what went whole is gone already.

    Args:
        source: the whole model.
        budget: how much to remove.
        size: of the model without those that go.
    """
    if budget.of == "ffn" or not (budget.whole_parts or budget.removes_experts):
        return budget
    stay = (1 - budget.sparsity) * parameter_count(source)
    return replace(budget, sparsity=max(0.0, 1 - stay / size.parameters))

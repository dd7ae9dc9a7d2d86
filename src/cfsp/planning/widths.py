"""How many channels every unit keeps, from statistics and a candidate.

What goes whole is decided before; the rest is planned as if it were the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import WeightSource, ffn_parameters_per_channel, parameter_count
from cfsp.planning.allocation import ModelSize, UnitSize, allocate
from cfsp.planning.candidate import NOTHING, Candidate, Dropped, parameters_dropped
from cfsp.planning.coarse import importance_of_units
from cfsp.planning.keep import kept_by
from cfsp.settings import (
    AUTO_METRIC,
    DIVERGENCE,
    RUNS,
    SENSITIVITY,
    UNIFORM,
    Budget,
    Criterion,
    Part,
)

# torch multiplies experts in groups only if rows are whole 16 bytes: 8 values of 16 bits.
EXPERTS_GRAIN = 8


def model_size(
    source: WeightSource, dropped: Dropped = NOTHING, keep: Sequence[str] = ()
) -> ModelSize:
    """Return the numbers of a model that budgets of channels are about.

    Args:
        source: the model.
        dropped: what goes whole, which does not count.
        keep: what is to keep all its channels (`cfsp.planning.keep`).
    """
    stays = kept_by(source, keep).units
    return ModelSize(
        units=tuple(
            UnitSize(
                width=unit.width,
                channel_parameters=each,
                kind=unit.path,
                grain=EXPERTS_GRAIN if unit.routed else 1,
                part=unit.part,
                stays=index in stays,
            )
            for index, (unit, each) in enumerate(
                zip(source.units, ffn_parameters_per_channel(source), strict=True)
            )
            if not dropped.takes(unit)
        ),
        parameters=parameter_count(source) - parameters_dropped(source, dropped),
    )


def parameters_of_channels(
    source: WeightSource, parts: Sequence[Part], dropped: Dropped = NOTHING
) -> int:
    """Return the parameters of all channels of these parts beside what goes whole."""
    size = model_size(source, dropped).of_parts(parts)
    return size.cost_of(size.width_U) * size.parameters_per_cost


def definite_criterion(criterion: Criterion, statistics: Statistics, budget: Budget) -> Criterion:
    """Return a criterion that names its metrics: of `auto` what the statistics allow."""
    if criterion.removal == AUTO_METRIC:
        parts = budget.whole_parts
        has_order = len(parts) > 1 or statistics.removals_of(parts)
        criterion = replace(criterion, removal=DIVERGENCE if has_order else RUNS)
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
    candidate: Candidate,
    budget: Budget,
    criterion: Criterion,
) -> UnitWidths:
    """Decide how many channels every unit keeps.

    Args:
        source: the model.
        statistics: of all its blocks.
        candidate: how much goes.
        budget: what widths look like.
        criterion: what counts as important, by its definite metrics.

    Raises:
        BudgetError: so much cannot go.
        StatisticsError: the block metric requires a sensitivity, and the statistics have none.
        UsageError: a metric is unknown.
    """
    dropped = candidate.dropped
    size, staying = model_size(source, dropped, budget.keep), statistics
    if dropped:
        staying = statistics.without_attentions(dropped.attentions).without_blocks(dropped.blocks)
    distance_U, importance_U = importance_of_units(
        staying, criterion.block_metric, size, candidate.parts or budget.parts
    )
    kept_U = size.width_U
    if candidate.parts:
        asked = replace(budget, sparsity=candidate.sparsity, parts=candidate.parts)
        kept_U = allocate(importance_U, asked, size, criterion.chosen_clamp)
    if not dropped:
        return UnitWidths(distance_U, importance_U, kept_U)
    block_L = statistics.distances("angular")
    attention_L = statistics.of_part("kv").distances("angular")
    planned = zip(distance_U, importance_U, kept_U, strict=True)
    rows = []
    for unit in source.units:
        if dropped.takes(unit):
            alone = unit.block in dropped.attentions
            rows.append(((attention_L if alone else block_L)[unit.block], 0.0, 0))
        else:
            rows.append(next(planned))
    return UnitWidths(*(list(column) for column in zip(*rows, strict=True)))

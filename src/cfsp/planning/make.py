"""Planning: from statistics to a plan, in seconds, without a forward pass."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor

from cfsp.calibration.statistics import Statistics, UnitStatistics
from cfsp.checkpoint.reading import (
    WeightSource,
    ffn_parameters_per_channel,
    fingerprint,
    parameter_count,
)
from cfsp.engine.block_proof import check_experts_can_go
from cfsp.errors import StatisticsError
from cfsp.planning.allocation import ModelSize, UnitSize, allocate
from cfsp.planning.coarse import importance_of_units
from cfsp.planning.experts import (
    expert_scores,
    lost_output,
    strongest_experts,
    warn_of_lost_experts,
)
from cfsp.planning.fine import channel_scores, read_ffn_weights, strongest_channels
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.removal import definite_removal, whole_removal
from cfsp.planning.removal_budget import RemovedWhole, WholeSizes, parameters_with_experts
from cfsp.planning.unit_plan import UnitPlan
from cfsp.progress import item_progress
from cfsp.settings import (
    AUTO_METRIC,
    DEFAULT_PARTS,
    SENSITIVITY,
    UNIFORM,
    Budget,
    Criterion,
)

# The relative error of a root mean square over n tokens is about 1 / sqrt(2 n): one in eight here.
LEAST_TOKENS = 32
WEIGHTS_ALONE = "magnitude"

# torch multiplies experts in groups only if rows are whole 16 bytes: 8 values of 16 bits.
EXPERTS_GRAIN = 8
_MOST_NAMED = 8

NOTHING = RemovedWhole()

log = logging.getLogger(__name__)


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


def choose_channels(
    source: WeightSource,
    unit: int,
    statistics: UnitStatistics,
    width: int,
    criterion: Criterion,
    experts: int = 0,
) -> tuple[int, ...]:
    """Return the strongest channels of one unit, ascending; of each of the strongest experts.

    An expert that saw fewer than `LEAST_TOKENS` tokens is scored by its weights alone
    (`magnitude`), and the plan says so.

    Args:
        source: the model.
        unit: index of the unit in the model.
        statistics: of the unit.
        width: channels that stay in each FFN.
        criterion: what counts as important.
        experts: how many go of routed experts.

    Raises:
        UsageError: the channel metric is unknown.
    """
    staying = _staying(source, unit, statistics, experts)
    channels = source.units[unit].width
    if width == channels:
        return tuple(ffn * width + i for ffn in staying for i in range(width))
    kept: list[int] = []
    if not width:
        return ()
    scores = ffn_scores(source, unit, statistics, criterion, staying)
    for ffn, score_F in zip(staying, scores, strict=True):
        kept += [ffn * channels + i for i in strongest_channels(score_F, width)]
    return tuple(kept)


def channels_that_stay(
    source: WeightSource,
    statistics: Statistics,
    widths: UnitWidths,
    criterion: Criterion,
    removed: RemovedWhole,
) -> Iterator[tuple[int, ...]]:
    """Yield the channels of every unit that stay, in the order of units; see `choose_channels`."""
    for unit, width in enumerate(widths.kept_U):
        observed = statistics.units[unit]
        yield choose_channels(source, unit, observed, width, criterion, removed.experts)


def _staying(
    source: WeightSource, unit: int, statistics: UnitStatistics, experts: int
) -> Sequence[int]:
    """Return the FFNs of a unit that stay if so many routed experts go."""
    of_model = source.architecture.experts
    if not experts or not source.units[unit].expert_axes or of_model is None:
        return range(statistics.ffns)
    count = statistics.ffns - experts
    return strongest_experts(expert_scores(statistics), count, of_model.groups)


def ffn_scores(
    source: WeightSource,
    unit: int,
    statistics: UnitStatistics,
    criterion: Criterion,
    ffns: Sequence[int],
) -> Iterator[Tensor]:
    """Yield the channel scores of FFNs of a unit, as float32 [F]; see `choose_channels`.

    Args:
        source: the model.
        unit: index of the unit in the model.
        statistics: of the unit.
        criterion: what counts as important.
        ffns: of which.
    """
    few = few_tokens(statistics)
    for ffn in ffns:
        weights = read_ffn_weights(source, unit, ffn)
        metric = WEIGHTS_ALONE if ffn in few else criterion.channel_metric
        score_F = channel_scores(metric, statistics.of_ffn(ffn), weights)
        # The columns of a KV group lie side by side.
        yield score_F.view(source.units[unit].width, -1).sum(1)


def warn_of_few_tokens(plan: PruningPlan) -> None:
    """Tell people which experts saw too few tokens for their scores to be good."""
    few = plan.experts_with_few_tokens
    named = [expert_in_words(expert) for expert in few[:_MOST_NAMED]]
    more = f" and {len(few) - _MOST_NAMED} more" if len(few) > _MOST_NAMED else ""
    consequences = ["whether they go is decided by noisy scores"] if plan.kept_experts else []
    if any(unit.few_tokens and unit.kept_width < unit.width for unit in plan.kept_units):
        consequences.append(f"their channels are chosen by their weights alone ({WEIGHTS_ALONE})")
    if not (few and consequences):
        return
    log.warning(
        "%d of %d experts saw fewer than %d calibration tokens, so %s: %s%s; give more --samples",
        len(few),
        sum(unit.ffns for unit in plan.kept_units if unit.ffns > 1),
        LEAST_TOKENS,
        ", and ".join(consequences),
        ", ".join(named),
        more,
    )


def expert_in_words(expert: Mapping[str, Any]) -> str:
    """Name an expert that saw few tokens (see `PruningPlan.experts_with_few_tokens`)."""
    path = f" {expert['path']}" if "path" in expert else ""
    return f"block {expert['block']}{path} expert {expert['expert']} ({expert['tokens']})"


def few_tokens(statistics: UnitStatistics) -> dict[int, int]:
    """Return the experts that saw too few tokens to be scored by them, and how many they saw."""
    return {expert: seen for expert, seen in enumerate(statistics.routed_E) if seen < LEAST_TOKENS}


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
            f"({statistics.record.fingerprint}), not for {source.label} ({found}); "
            "calibrate this model"
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

"""Planning: from statistics to a plan, in seconds, without a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from cfsp.calibration.statistics import BlockStatistics, Statistics
from cfsp.checkpoint.families import intermediate_sizes
from cfsp.checkpoint.reading import (
    WeightSource,
    ffn_parameters_per_channel,
    fingerprint,
    parameter_count,
)
from cfsp.errors import StatisticsError
from cfsp.planning.allocation import ModelSize, allocate
from cfsp.planning.coarse import block_distances, importance_by
from cfsp.planning.fine import channel_scores, read_ffn_weights, strongest_channels
from cfsp.planning.plan_file import BlockPlan, ModelIdentity, PruningPlan
from cfsp.progress import item_progress
from cfsp.settings import Budget, Criterion

# The relative error of a root mean square over n tokens is about 1 / sqrt(2 n): one in eight here.
LEAST_TOKENS = 32
WEIGHTS_ALONE = "magnitude"

# torch multiplies experts in groups only if rows are whole 16 bytes: 8 values of 16 bits.
EXPERTS_GRAIN = 8
_MOST_NAMED = 8

log = logging.getLogger(__name__)


def model_size(source: WeightSource) -> ModelSize:
    """Return the numbers of a model that budgets are about."""
    width_L = tuple(intermediate_sizes(source.config))
    return ModelSize(
        width_L=width_L,
        channel_parameters_L=ffn_parameters_per_channel(source),
        parameters=parameter_count(source),
        grain=EXPERTS_GRAIN if source.family.experts else 1,
    )


@dataclass(frozen=True)
class BlockWidths:
    """The coarse half of a decision: how many channels every block keeps, and why.

    Attributes:
        distance_L: coarse distance of every block.
        importance_L: normalised importance, in (0, 1).
        kept_L: channels that stay.
    """

    distance_L: list[float]
    importance_L: list[float]
    kept_L: list[int]


def plan_widths(
    source: WeightSource, statistics: Statistics, budget: Budget, criterion: Criterion
) -> BlockWidths:
    """Decide how many channels every block keeps.

    Raises:
        BudgetError: the budget can't be met.
        StatisticsError: the block metric requires a sensitivity, and the statistics have none.
        UsageError: a metric is unknown.
    """
    size = model_size(source)
    distance_L = block_distances(statistics, criterion.block_metric)
    importance_L = importance_by(statistics, criterion.block_metric)
    kept_L = allocate(importance_L, budget, size, criterion.chosen_clamp)
    return BlockWidths(distance_L, importance_L, kept_L)


def choose_channels(
    source: WeightSource,
    block: int,
    statistics: BlockStatistics,
    width: int,
    criterion: Criterion,
) -> tuple[int, ...]:
    """Return the strongest channels of one block, ascending; of each expert its own.

    An expert that saw fewer than `LEAST_TOKENS` tokens is scored by its weights alone
    (`magnitude`), and the plan says so.

    Args:
        source: the model.
        block: index of the block.
        statistics: of the block.
        width: channels that stay in each FFN.
        criterion: what counts as important.

    Raises:
        UsageError: the channel metric is unknown.
    """
    kept: list[int] = []
    for ffn, score_F in enumerate(ffn_scores(source, block, statistics, criterion)):
        kept += [ffn * statistics.width + i for i in strongest_channels(score_F, width)]
    return tuple(kept)


def ffn_scores(
    source: WeightSource, block: int, statistics: BlockStatistics, criterion: Criterion
) -> Iterator[Tensor]:
    """Yield the channel scores of every FFN of a block, as float32 [F]; see `choose_channels`."""
    few = few_tokens(statistics)
    for ffn in range(statistics.ffns):
        weights = read_ffn_weights(source, block, ffn)
        metric = WEIGHTS_ALONE if ffn in few else criterion.channel_metric
        yield channel_scores(metric, statistics.of_ffn(ffn), weights)


def warn_of_few_tokens(plan: PruningPlan) -> None:
    """Tell people which experts are scored by their weights alone."""
    few = plan.experts_with_few_tokens
    if not few:
        return
    named = [f"block {e['block']} expert {e['expert']} ({e['tokens']})" for e in few[:_MOST_NAMED]]
    more = f" and {len(few) - _MOST_NAMED} more" if len(few) > _MOST_NAMED else ""
    log.warning(
        "%d of %d experts saw fewer than %d calibration tokens, so their channels are chosen by "
        "their weights alone (%s): %s%s; give more --samples",
        len(few),
        sum(block.ffns for block in plan.blocks),
        LEAST_TOKENS,
        WEIGHTS_ALONE,
        ", ".join(named),
        more,
    )


def few_tokens(statistics: BlockStatistics) -> dict[int, int]:
    """Return the experts that saw too few tokens to be scored by them, and how many they saw."""
    return {expert: seen for expert, seen in enumerate(statistics.routed_E) if seen < LEAST_TOKENS}


def make_plan(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    on_block: Callable[[], object] = lambda: None,
) -> PruningPlan:
    """Decide which channels stay.

    Args:
        source: the model; its FFN weights are read one block at a time.
        statistics: its calibration.
        budget: how much to remove.
        criterion: what counts as important.
        on_block: is called after each block.

    Raises:
        StatisticsError: the statistics belong to another model.
        BudgetError: the budget can't be met.
        UsageError: a metric is unknown.
    """
    check_statistics_fit(source, statistics)
    widths = plan_widths(source, statistics, budget, criterion)
    kept = []
    for block, width in enumerate(widths.kept_L):
        kept.append(choose_channels(source, block, statistics.blocks[block], width, criterion))
        on_block()
    return assemble_plan(source, statistics, budget, criterion, widths, kept)


def assemble_plan(
    source: WeightSource,
    statistics: Statistics,
    budget: Budget,
    criterion: Criterion,
    widths: BlockWidths,
    kept: Sequence[tuple[int, ...]],
) -> PruningPlan:
    """Return the plan that widths and channels amount to."""
    before = intermediate_sizes(source.config)
    ffns = [block.ffns for block in statistics.blocks]
    few = [few_tokens(block) for block in statistics.blocks]
    blocks = zip(before, kept, widths.distance_L, widths.importance_L, ffns, few, strict=True)
    return PruningPlan(
        model=ModelIdentity.of(source),
        criterion={
            **asdict(criterion),
            "clamp": criterion.chosen_clamp,
            "sparsity": budget.sparsity,
            "of": budget.of,
            "multiple": budget.multiple_for(before),
        },
        calibration=asdict(statistics.record),
        blocks=tuple(BlockPlan(*block) for block in blocks),
    )


def check_statistics_fit(source: WeightSource, statistics: Statistics) -> None:
    """Check that statistics belong to a model.

    Raises:
        StatisticsError: they belong to another one.
    """
    found = fingerprint(source)
    shapes = [(block.ffns, block.width) for block in statistics.blocks]
    ffns = source.family.ffn_count(source.config)
    expected = [(ffns, width) for width in intermediate_sizes(source.config)]
    if statistics.record.fingerprint != found or shapes != expected:
        raise StatisticsError(
            f"the statistics were made for {statistics.record.model} "
            f"({statistics.record.fingerprint}), not for {source.label} ({found}); "
            "calibrate this model"
        )


def plan_from_statistics(
    source: WeightSource, statistics: Statistics, budget: Budget, criterion: Criterion
) -> PruningPlan:
    """Make a plan from statistics, showing progress; see `make_plan`."""
    with item_progress("plan", source.config.num_hidden_layers, "block") as bar:
        plan = make_plan(source, statistics, budget, criterion, on_block=bar.update)
    warn_of_few_tokens(plan)
    return plan

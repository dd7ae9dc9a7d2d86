"""Which channels of a unit stay, when their number is decided: the strongest.

Experts that saw too few tokens are scored by their weights alone, and people are told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cfsp.calibration.observed import UnitStatistics
from cfsp.checkpoint.reading import WeightSource
from cfsp.planning.experts import expert_scores, strongest_experts
from cfsp.planning.fine import (
    channel_scores,
    read_ffn_weights,
    strongest_channels,
    weight_norms,
)
from cfsp.planning.plan_file import PruningPlan
from cfsp.settings import Criterion

# The relative error of a root mean square over n tokens is about 1 / sqrt(2 n): one in eight here.
LEAST_TOKENS = 32

_MOST_NAMED = 8

log = logging.getLogger(__name__)


def choose_channels(
    source: WeightSource,
    unit: int,
    statistics: UnitStatistics,
    width: int,
    criterion: Criterion,
    experts: int = 0,
) -> tuple[int, ...]:
    """Return the strongest channels of one unit, ascending; of each of the strongest experts.

    An expert that saw fewer than `LEAST_TOKENS` tokens is scored by its weights alone, and the plan
    says so.

    Args:
        source: the model.
        unit: index of the unit in the model.
        statistics: of the unit.
        width: channels that stay in each FFN.
        criterion: what counts as important.
        experts: how many go of routed experts.
    """
    found, of_model = source.units[unit], source.architecture.experts
    staying: Sequence[int] = range(statistics.ffns)
    if experts and found.expert_axes and of_model is not None:
        scores = expert_scores(statistics)
        staying = strongest_experts(scores, statistics.ffns - experts, of_model.groups)
    if width == found.width:
        return tuple(ffn * width + i for ffn in staying for i in range(width))
    kept: list[int] = []
    few = few_tokens(statistics)
    for ffn in staying if width else ():
        weights = read_ffn_weights(source, unit, ffn)
        if ffn in few:
            score_F = weight_norms(weights)
        else:
            score_F = channel_scores(criterion.channel_metric, statistics.of_ffn(ffn), weights)
        # The columns of a KV group lie side by side.
        score_F = score_F.view(found.width, -1).sum(1)
        kept += [ffn * found.width + i for i in strongest_channels(score_F, width)]
    return tuple(kept)


def warn_of_few_tokens(plan: PruningPlan) -> None:
    """Tell people which experts saw too few tokens for their scores to be good."""
    few = plan.experts_with_few_tokens
    named = [expert_in_words(expert) for expert in few[:_MOST_NAMED]]
    more = f" and {len(few) - _MOST_NAMED} more" if len(few) > _MOST_NAMED else ""
    consequences = ["whether they go is decided by noisy scores"] if plan.kept_experts else []
    if any(unit.few_tokens and unit.kept_width < unit.width for unit in plan.kept_units):
        consequences.append("their channels are chosen by their weights alone")
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

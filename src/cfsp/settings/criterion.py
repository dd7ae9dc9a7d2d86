"""What counts as important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cfsp.settings.options import advanced_option, check_declared

# By sensitivity where it was measured, else by angular distance.
AUTO_METRIC = "auto"
# How far a block turns the hidden state (the paper's); what pruning it alone does to the
# predictions, for which the whole model must be in memory; all blocks alike.
ANGULAR, SENSITIVITY, UNIFORM = "angular", "sensitivity", "uniform"
BLOCK_METRICS = (ANGULAR, SENSITIVITY, UNIFORM)
# Which blocks go whole: by the predictions, or by how far runs of them turn the hidden state.
DIVERGENCE, RUNS = "divergence", "runs"
REMOVALS = (DIVERGENCE, RUNS)
CHANNEL_METRICS = ("relative", "eq8", "activation")

Clamp = Literal["water-fill", "published"]
CLAMPS: tuple[Clamp, ...] = get_args(Clamp)
DEFAULT_CLAMP: Clamp = "published"


# What went whole, by `removal`: that without which ...
_REMOVED_IN_WORDS = {
    DIVERGENCE: "without which its predictions change least",
    RUNS: "over which its hidden states turn least",
}
_WORTH_IN_WORDS = {
    ANGULAR: "the further they turn the hidden state",
    SENSITIVITY: "the further the predictions move when one alone loses about half of them",
}


def removal_in_words(removal: str) -> str:
    """Return by what the parts of a model were chosen that went whole, as `its` relative clause."""
    return _REMOVED_IN_WORDS.get(removal, "which cfsp was told to remove")


def worth_in_words(metric: str, things: str, channels: str) -> str:
    """Return the sentence that says which of some things, such as blocks, keep more channels."""
    if metric == UNIFORM:
        return f"{things} count alike."
    # Plans of earlier versions have other metrics.
    return f"{things} keep more of their {channels} {_WORTH_IN_WORDS.get(metric, f'by {metric}')}."


@dataclass(frozen=True)
class Criterion:
    """What makes a block (`cfsp.planning.coarse`) and a channel (`fine`) important."""

    block_metric: str = advanced_option(
        AUTO_METRIC,
        "what makes a block important: the angle between its input and output, or sensitivity, "
        "what pruning the block alone does to the predictions, which requires the whole model in "
        "memory; auto: sensitivity where there is repair and that memory, else angular",
        choices=(AUTO_METRIC, *BLOCK_METRICS),
    )
    channel_metric: str = advanced_option(
        "relative", "score that makes a channel important", choices=CHANNEL_METRICS
    )
    clamp: Clamp | None = advanced_option(
        None,
        "a block that would keep more than all: keep it whole and give the rest to the others "
        "(water-fill), or shrink all importances as the published code does",
        choices=CLAMPS,
        default="water-fill by sensitivity, else published",
    )
    removal: str = advanced_option(
        AUTO_METRIC,
        "how whole blocks are chosen: by what the predictions lose without them (divergence, which "
        "requires the whole model in memory), or by the angular distance over runs of them (runs); "
        "auto: divergence where there is that memory, else runs",
        choices=(AUTO_METRIC, *REMOVALS),
    )

    def __post_init__(self) -> None:
        check_declared(self)

    @property
    def chosen_clamp(self) -> Clamp:
        """The clamp, also where none is named: `water-fill` by sensitivity, else `published`."""
        by_sensitivity = self.block_metric == SENSITIVITY
        return self.clamp or ("water-fill" if by_sensitivity else DEFAULT_CLAMP)

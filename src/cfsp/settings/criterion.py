"""What counts as important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cfsp.settings.options import advanced_option, check_declared

# By sensitivity where it was measured, else by angular distance.
AUTO_METRIC = "auto"
# How far a block turns the hidden state (the paper's); what pruning it alone does to the
# predictions, for which the whole model must be in memory; all blocks alike.
ANGULAR, SENSITIVITY, UNIFORM = "angular", "sensitivity", "uniform"
BLOCK_METRICS = (ANGULAR, SENSITIVITY, UNIFORM)
# Which blocks go whole: by the predictions where the whole model fits into memory, else by how far
# runs of them turn the hidden state.
DIVERGENCE, RUNS = "divergence", "runs"
CHANNEL_METRICS = ("relative", "eq8", "activation")

Clamp = Literal["water-fill", "published"]
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

    def __post_init__(self) -> None:
        check_declared(self)

    @property
    def clamp(self) -> Clamp:
        """What becomes of a block that would keep more than all.

        By sensitivity it stays whole and the others get the rest (`water-fill`), else all
        importances shrink, as the published code has it.
        """
        return "water-fill" if self.block_metric == SENSITIVITY else DEFAULT_CLAMP

"""What counts as important."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from cfsp.settings.options import advanced_option, check_declared

DISTANCES = ("angular", "cosine", "euclidean", "mse", "mae")
# All blocks are alike.
UNIFORM = "uniform"
BLOCK_METRICS = (*DISTANCES, UNIFORM)
# By pruning each block (`cfsp.selection.sensitivity`), alone or with the angular importance.
# Not every calibration measures that: the whole model must be in memory.
SENSITIVITY, ANGULAR_AND_SENSITIVITY = "sensitivity", "angular+sensitivity"
SENSITIVITY_METRICS = (SENSITIVITY, ANGULAR_AND_SENSITIVITY)
# By sensitivity where it was measured, else by angular distance.
AUTO_METRIC = "auto"
# Which blocks go whole: together by the predictions, together by how far runs of them turn the
# hidden state, or each by what it alone does (ShortGPT's block influence).
DIVERGENCE, RUNS, INFLUENCE = "divergence", "runs", "influence"
REMOVALS = (DIVERGENCE, RUNS, INFLUENCE)
CHANNEL_METRICS = ("relative", "eq8", "activation", "wanda", "magnitude", "random")

Clamp = Literal["water-fill", "published"]
CLAMPS: tuple[Clamp, ...] = get_args(Clamp)
DEFAULT_CLAMP: Clamp = "published"


# What went whole, by `removal`: that without which ...
_REMOVED_IN_WORDS = {
    DIVERGENCE: "without which its predictions change least",
    RUNS: "over which its hidden states turn least",
    INFLUENCE: "each of which turns its hidden states least",
}
_WORTH_IN_WORDS = {
    "angular": "the further they turn the hidden state",
    SENSITIVITY: "the further the predictions move when one alone loses about half of them",
    ANGULAR_AND_SENSITIVITY: "the further they turn the hidden state, and the further the "
    "predictions move when one alone loses about half of them",
}


def block_metric_in_words(metric: str) -> str:
    """Return what makes a block important, for people."""
    return f"{metric} distance" if metric in DISTANCES else metric


def removal_in_words(removal: str) -> str:
    """Return by what the parts of a model were chosen that went whole, as `its` relative clause."""
    return _REMOVED_IN_WORDS.get(removal, "which cfsp was told to remove")


def worth_in_words(metric: str, things: str, channels: str) -> str:
    """Return the sentence that says which of some things, such as blocks, keep more channels."""
    if metric == UNIFORM:
        return f"{things} count alike."
    further = f"the further they move the hidden state, by {metric} distance"
    return f"{things} keep more of their {channels} {_WORTH_IN_WORDS.get(metric, further)}."


@dataclass(frozen=True)
class Criterion:
    """What makes a block (`cfsp.planning.coarse`) and a channel (`fine`) important."""

    block_metric: str = advanced_option(
        AUTO_METRIC,
        "what makes a block important: a distance between its input and output, or sensitivity, "
        "what pruning the block alone does to the predictions, which requires the whole model in "
        "memory; auto: sensitivity where there is repair and that memory, else angular",
        choices=(AUTO_METRIC, *BLOCK_METRICS, *SENSITIVITY_METRICS),
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
        "requires the whole model in memory), by the angular distance over runs of them (runs), or "
        "each by its own cosine distance (influence); auto: divergence where there is that "
        "memory, else runs",
        choices=(AUTO_METRIC, *REMOVALS),
    )

    def __post_init__(self) -> None:
        check_declared(self)

    @property
    def chosen_clamp(self) -> Clamp:
        """The clamp, also where none is named: `water-fill` by sensitivity, else `published`."""
        by_sensitivity = self.block_metric in SENSITIVITY_METRICS
        return self.clamp or ("water-fill" if by_sensitivity else DEFAULT_CLAMP)

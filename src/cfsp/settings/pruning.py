"""What counts as important, where to compute, how to repair; and all that is asked of a pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from cfsp.errors import UsageError
from cfsp.settings.budget import GOALS, Budget, Goal, TargetParameters, flag_of_goal
from cfsp.settings.options import (
    Declared,
    Option,
    advanced_option,
    check_value,
    from_names,
    given_of,
    option,
    parse_size,
)
from cfsp.settings.text import CalibrationText, EvaluationText

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
    # A plan that somebody wrote by hand may have another one.
    return f"{things} keep more of their {channels} {_WORTH_IN_WORDS.get(metric, f'by {metric}')}."


@dataclass(frozen=True)
class Criterion(Declared):
    """What makes a block and a channel important; see `cfsp.planning.importance`."""

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

    @property
    def clamp(self) -> Clamp:
        """What becomes of a block that would keep more than all.

        By sensitivity it stays whole and the others get the rest (`water-fill`), else all
        importances shrink, as the published code has it.
        """
        return "water-fill" if self.block_metric == SENSITIVITY else DEFAULT_CLAMP


DTYPES = ("auto", "float32", "bfloat16", "float16")
AUTO_DTYPE = "the model's own, or float32 where the device only emulates that"

Repair = Literal["none", "ridge", "sequential"]
REPAIRS: tuple[Repair, ...] = get_args(Repair)

EFFORTS: dict[str, Repair] = {"fast": "none", "standard": "ridge", "best": "sequential"}
DEFAULT_EFFORT = "standard"
# After its repair the model is trained, where there is memory for that.
BEST_EFFORT = "best"


@dataclass(frozen=True)
class Compute(Declared):
    """Where to compute and in what; `cfsp.streaming.runtime.runtime_of` makes `auto` definite."""

    device: str = option("auto", "cpu, cuda, cuda:1, ...", default="an accelerator")
    dtype: str = advanced_option("auto", "what to compute in", choices=DTYPES, default=AUTO_DTYPE)
    batch_windows: int | None = advanced_option(
        None, "windows that pass a block together", kind=int, least=1, default="about 4096 tokens"
    )
    memory_budget: int | None = advanced_option(
        None,
        "hidden states above this size (2GB, 512MiB) go to a file beside the output",
        kind=parse_size,
        least=0,
        metavar="SIZE",
        default="half of the available memory",
    )


@dataclass(frozen=True)
class PruneSettings(Declared):
    """How to prune."""

    budget: Budget  # without meaning beside a plan; of a goal only what it does not say itself
    criterion: Criterion = field(default_factory=Criterion)
    text: CalibrationText = field(default_factory=CalibrationText)
    compute: Compute = field(default_factory=Compute)
    repair: Repair = advanced_option(
        EFFORTS[DEFAULT_EFFORT],
        "the repair by its name, instead of --effort: each includes those before it",
        choices=REPAIRS,
        default="",
    )
    goal: Goal | None = None
    # Nobody said what may go: a goal for parameters may also take blocks (`selection.goal`).
    leaves_parts_open: bool = False
    evaluation: EvaluationText = field(default_factory=EvaluationText)

    def __post_init__(self) -> None:
        super().__post_init__()
        metric = self.criterion.block_metric
        if self.budget.widths == "equal" and metric not in (AUTO_METRIC, UNIFORM):
            raise UsageError(
                f"--widths equal makes all blocks alike, so --set block_metric={metric} would do "
                "nothing; give one of the two"
            )

    @property
    def repairs(self) -> bool:
        """Whether there may be a repair: nothing that stays could take over what experts did."""
        return self.repair != "none" and "experts" not in self.budget.parts

    def suited_to_repair(self) -> PruneSettings:
        """Return the same settings, with what is left open as it is best with this repair.

        Widths by sensitivity are better with repair and worse without (LOG.md): of `auto`, blocks
        go by angular distance without. Which parts go is open for a goal of parameters alone, and
        not without repair, because trying takes many passes. Equal widths follow nothing.
        """
        criterion, repairs = self.criterion, self.repair != "none"
        if self.budget.widths == "equal":
            criterion = replace(criterion, block_metric=UNIFORM)
        elif not repairs and criterion.block_metric == AUTO_METRIC:
            criterion = replace(criterion, block_metric=ANGULAR)
        is_tried = self.leaves_parts_open and repairs and isinstance(self.goal, TargetParameters)
        return replace(self, criterion=criterion, leaves_parts_open=is_tried)


# Whatever a pruning is asked for is an option of one of these.
OF_PRUNE: tuple[type[Any], ...] = (
    Budget,
    *GOALS,
    Criterion,
    CalibrationText,
    EvaluationText,
    Compute,
)


def asked(given: Mapping[str, Any], goal: Goal | None = None) -> list[str]:
    """Return the flags of all that says how much goes: a share, a number, or a goal."""
    if goal is not None and not isinstance(goal, Goal):
        raise UsageError(
            "goal must be TargetParameters, TargetKVCache, TargetSpeedup or MaxLossIncrease, found "
            f"{goal!r}"
        )
    budget = given_of(Budget, given)
    goals = [] if goal is None else [flag_of_goal(type(goal))]
    goals += [
        flag_of_goal(kind) for kind in GOALS if flag_of_goal(kind) in given_of(kind, given).values()
    ]
    return [flag for flag in (budget.get("sparsity"), *goals, budget.get("remove")) if flag]


def prune_settings(given: Mapping[str, Any], goal: Goal | None = None) -> PruneSettings:
    """Return what a pruning is asked for, by the names of its options: a command's or a call's."""
    found = asked(given, goal)
    if len(found) != 1:
        raise UsageError(
            f"exactly one of --sparsity, {', '.join(map(flag_of_goal, GOALS))} "
            "says how much to remove (or --plan, a complete decision; or, where blocks, attention "
            f"layers or experts go, their number); found {' and '.join(found) or 'none'}"
        )
    for kind in GOALS:
        owner, is_asked = flag_of_goal(kind), found == [flag_of_goal(kind)] and goal is None
        for flag in given_of(kind, given).values():
            if flag != owner and not is_asked:
                raise UsageError(f"{flag} belongs to {owner}")
        goal = from_names(kind, given) if is_asked else goal
    effort, repair = given.get("effort") or DEFAULT_EFFORT, given.get("repair")
    check_value(effort, Option("", flag="effort", choices=tuple(EFFORTS)))
    if repair and given.get("effort"):
        raise UsageError(f"--effort {effort} is --repair {EFFORTS[effort]}; give one of the two")
    is_open = given.get("parts") is None
    return PruneSettings(
        budget=from_names(Budget, given).for_goal(goal, leaves_parts_open=is_open),
        criterion=from_names(Criterion, given),
        text=from_names(CalibrationText, given),
        compute=from_names(Compute, given),
        repair=repair or EFFORTS[effort],
        goal=goal,
        leaves_parts_open=is_open,
        evaluation=from_names(EvaluationText, given, seqlen=None),
    )

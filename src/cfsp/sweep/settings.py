"""What a sweep does: a model pruned by every method at every sparsity, and what is measured.

A method is what `cfsp prune` is told:

    cfsp            what `cfsp prune` does: blocks by sensitivity where the model fits into memory,
                    else by angular distance, channels by relative importance, repaired
    cfsp-plain      blocks by angular distance, without repair
    cfsp-published  what the released code of arXiv 2409.13199 does: its channel score is the
                    activation's norm alone, widths are multiples of 128, nothing is repaired

A part as `cfsp prune --parts` names it, such as `blocks`, is a method too: what `cfsp prune` does
with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cfsp.errors import UsageError, did_you_mean
from cfsp.settings import (
    ANGULAR,
    DEFAULT_TEXT,
    PARTS,
    Bos,
    CalibrationText,
    Compute,
    EvaluationText,
    Part,
    PruneSettings,
    from_names,
    names_in,
    prune_settings,
)

_PLAIN = {"block_metric": ANGULAR, "repair": "none"}
# Values of options of `cfsp prune` by their names.
METHODS: dict[str, dict[str, Any]] = {
    "cfsp": {},
    "cfsp-plain": _PLAIN,
    "cfsp-published": {**_PLAIN, "channel_metric": "activation", "multiple": 128},
}


def method_named(name: str) -> str:
    """Return the name of a method; of parts as they are called in their own order."""
    if name in METHODS:
        return name
    given = names_in(name)
    if not {*given} <= {*PARTS}:
        raise UsageError(
            f"unknown method {name!r}{did_you_mean(name, METHODS)}; known are: "
            f"{', '.join(METHODS)}, and a part as cfsp prune --parts has it, such as blocks"
        )
    return ",".join(part for part in PARTS if part in given)


@dataclass(frozen=True)
class Point:
    """One model of a sweep: the name of its directory and of its method, and how it is pruned."""

    name: str
    method: str
    settings: PruneSettings

    @property
    def parts(self) -> tuple[Part, ...]:
        """Return what may go."""
        return self.settings.budget.parts


@dataclass(frozen=True)
class SweepSettings:
    """What a sweep does, by the names of its options; JSON types."""

    model: str
    sparsity: Sequence[float]
    eval: Sequence[str] = ()
    methods: Sequence[str] = ("cfsp",)
    multiple: int | None = None  # whatever the method; None for its own choice
    data: Sequence[str] = (DEFAULT_TEXT,)
    samples: int | None = None
    seqlen: int = CalibrationText.seqlen
    seed: int = CalibrationText.seed
    bos: Bos = CalibrationText.bos
    windows: int | None = EvaluationText.windows
    answers: int | str | None = None  # questions to ask all models, or a file of chats
    tasks: Sequence[str] = ()
    limit: int | None = None  # documents of each task
    task_data: str | None = None

    def __post_init__(self) -> None:
        if not self.eval:
            raise UsageError("a sweep needs a text to measure perplexity on; give --eval")
        names = [point.name for point in self.points(Compute())]
        if len(set(names)) < len(names):
            raise UsageError("a sweep has every method and every sparsity once")
        _ = self.evaluation  # checks its values
        if not self.tasks and (self.limit is not None or self.task_data is not None):
            raise UsageError("--limit and --task-data need --tasks")

    def points(self, compute: Compute) -> list[Point]:
        """Return all models, in the order in which they are made."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        found = []
        for name in self.methods:
            method = METHODS.get(name, {"parts": name})
            for sparsity in self.sparsity:
                settings = prune_settings({**method, **given, "sparsity": sparsity})
                # Beside the dense model all are measured afterwards.
                settings = replace(settings, compute=compute, evaluation=EvaluationText())
                found.append(Point(f"{name}-{sparsity:.12g}", name, settings))
        return found

    @property
    def evaluation(self) -> EvaluationText:
        """What to measure on."""
        return from_names(EvaluationText, vars(self))

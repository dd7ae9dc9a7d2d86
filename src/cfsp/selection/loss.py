"""Prune as much as fits into a loss: plans from one calibration, tried with channels masked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import BudgetError
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.make import model_size
from cfsp.quality.perplexity import perplexity
from cfsp.selection.constraint import (
    STEPS,
    Attempt,
    Constraint,
    highest_step,
    last_that_holds,
)
from cfsp.selection.divergence import load_whole
from cfsp.selection.masks import masked_loss
from cfsp.streaming.runtime import runtime_of
from cfsp.streaming.work_dir import load_or_compute
from cfsp.text.drawing import consecutive_windows, draw_left_over
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cfsp.planning.make import Planner
    from cfsp.settings import CalibrationText, MaxLossIncrease, Part, PruneSettings
    from cfsp.streaming.runtime import Runtime
    from cfsp.streaming.work_dir import WorkDir


@dataclass(frozen=True)
class LossIncrease(Constraint):
    """The loss before repair stays within a bound over the dense model's: as much goes as fits."""

    goal: MaxLossIncrease
    texts: list[Windows]  # to measure on
    runtime: Runtime
    work_dir: WorkDir  # keeps what was found for a run that is resumed
    found: dict[str, Any] = field(default_factory=dict)  # sparsity, dense loss, what was tried

    name = "max_loss_increase"

    @property
    def needs_statistics(self) -> bool:
        """They are what plans are made from."""
        return True

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the largest share whose loss fits."""
        self.found.update(
            load_or_compute(self.work_dir, "loss", lambda: self._measured(planner, tuple(parts)))
        )
        return float(self.found["sparsity"])

    def facts(self) -> dict[str, Any]:
        """Return what was asked for, tried, and what it was measured on."""
        conditions = {
            "dense_loss": self.found["dense"],
            "held_out": {name: n for each in self.texts for name, n in each.sources.items()},
            "tokens_digests": [windows.digest for windows in self.texts],
            "repair": "measured before any",
        }
        asked = {"goal": self.name, "asked": self.goal.nats}
        return {**asked, "tried": self.found["tried"], "conditions": conditions}

    def _measured(self, planner: Planner, parts: tuple[Part, ...]) -> dict[str, Any]:
        source, goal = self.source, self.goal
        model = load_whole(source, self.runtime, "--max-loss-increase")
        dense, size = loss_of(model, self.texts, "dense"), model_size(source, keep=self.budget.keep)
        tried: list[Attempt] = []

        def holds(step: int) -> bool:
            candidate = Candidate(parts=parts, sparsity=step / STEPS)
            plan = planner.plan(candidate)
            label = f"{candidate.sparsity:.1%} pruned"
            losses = [masked_loss(source, model, plan, each, label) for each in self.texts]
            increase = sum(losses) / len(losses) - dense
            parameters = size.parameters_with(plan.kept_widths)
            fits = increase <= goal.nats
            tried.append(Attempt(candidate.sparsity, parameters, increase, fits))
            return fits

        chosen = last_that_holds(highest_step(size.of_parts(parts), self.budget), holds)
        if chosen == 0:
            least = min(tried, key=lambda entry: entry.sparsity)
            raise BudgetError(
                f"the loss cannot stay within {goal.nats:g} nats per token of the dense model's "
                f"{dense:.3f}: already {least.sparsity:.1%} of the {channels_in_words(parts)} cost "
                f"{least.value:.3f}; allow more, or calibrate on text like that it is measured on"
            )
        return {
            "sparsity": chosen / STEPS,
            "dense": round(dense, 6),
            "tried": [vars(each) for each in tried],
        }


def held_out_windows(
    goal: MaxLossIncrease, text: CalibrationText, tokenizer: PreTrainedTokenizerBase
) -> list[Windows]:
    """Return the windows that a loss is bounded on, text by text; calibration has none of them."""
    if not goal.held_out:
        return [draw_left_over(text, tokenizer, goal.windows)]
    return [
        consecutive_windows(name, tokenizer, count=goal.windows, seqlen=text.seqlen, bos=text.bos)
        for name in goal.held_out
    ]


def loss_of(model: PreTrainedModel, texts: list[Windows], label: str) -> float:
    """Return the loss of a model in nats per token, the mean over texts."""
    losses = [math.log(perplexity(model, windows, label).value) for windows in texts]
    return sum(losses) / len(losses)


def loss_increase_of(
    directory: Path, goal: MaxLossIncrease, dense: float, settings: PruneSettings
) -> float:
    """Return how much the loss of a finished checkpoint is above the dense model's.

    It is measured on the windows of the bound, in nats per token.
    """
    texts = held_out_windows(goal, settings.text, load_tokenizer(directory))
    result = Checkpoint(directory)
    model = load_whole(result, runtime_of(settings.compute, result), "measuring the loss")
    return loss_of(model, texts, "result") - dense

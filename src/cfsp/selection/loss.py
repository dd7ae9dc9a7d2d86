"""Prune as much as fits into a loss: plans from one calibration, tried with channels masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.reading import Checkpoint
from cfsp.errors import BudgetError
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.candidate import Candidate, Dropped
from cfsp.planning.make import Planner, model_size
from cfsp.quality.perplexity import loss_in_memory
from cfsp.selection.constraint import (
    STEPS,
    Attempt,
    Constraint,
    highest_step,
    last_that_holds,
)
from cfsp.selection.divergence import load_whole, masked_channels
from cfsp.settings import CalibrationText, MaxLossIncrease, Part, PruneSettings
from cfsp.streaming.runtime import Runtime, runtime_of
from cfsp.streaming.work_dir import WorkDir, load_or_compute
from cfsp.text.drawing import draw_left_over
from cfsp.text.tokenizers import load_tokenizer
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELD_OUT_WINDOWS = 12


@dataclass(frozen=True)
class LossIncrease(Constraint):
    """The loss before repair stays within a bound over the dense model's: as much goes as fits."""

    goal: MaxLossIncrease
    held_out: Windows  # to measure on
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
            "held_out": self.held_out.sources,
            "tokens_digest": self.held_out.digest,
            "repair": "measured before any",
        }
        asked = {"goal": self.name, "asked": self.goal.nats, "tried": self.found["tried"]}
        return {**asked, "conditions": conditions}

    def _measured(self, planner: Planner, parts: tuple[Part, ...]) -> dict[str, Any]:
        source, goal = self.source, self.goal
        model = load_whole(source, self.runtime, "--max-loss-increase")
        dense = loss_in_memory(model, self.held_out, "dense")
        size = model_size(source, keep=self.budget.keep)
        tried: list[Attempt] = []

        def holds(step: int) -> bool:
            candidate = Candidate(parts=parts, sparsity=step / STEPS)
            plan = planner.plan(candidate)
            label = f"{candidate.sparsity:.1%} pruned"
            with masked_channels(source, model, dict(enumerate(plan.kept_channels))):
                increase = loss_in_memory(model, self.held_out, label) - dense
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


def held_out_windows(text: CalibrationText, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Return the windows that a loss is bounded on; calibration has none of them."""
    return draw_left_over(text, tokenizer, HELD_OUT_WINDOWS)


def loss_increase_of(directory: Path, dense: float, settings: PruneSettings) -> float:
    """Return how much the loss of a finished checkpoint is above the dense model's.

    It is measured on the windows of the bound, in nats per token.
    """
    held_out = held_out_windows(settings.text, load_tokenizer(directory))
    result = Checkpoint(directory)
    model = load_whole(result, runtime_of(settings.compute, result), "measuring the loss")
    return loss_in_memory(model, held_out, "result") - dense

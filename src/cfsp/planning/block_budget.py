"""How many whole blocks or attentions a budget removes.

Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.stored_blocks import parameters_of_attentions, parameters_of_blocks
from cfsp.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget


@dataclass(frozen=True)
class BlockBudget:
    """When enough blocks or attentions are removed.

    Attributes:
        parameters_of: those of everything that may go, by its block.
        count: how many go; None where `parameters` says it.
        parameters: how many parameters go, to within half of what goes.
    """

    parameters_of: Mapping[int, int]
    count: int | None
    parameters: float

    @staticmethod
    def of(source: WeightSource, budget: Budget) -> BlockBudget:
        """Return what a budget by which blocks or attentions go removes of a model.

        Raises:
            BudgetError: more than all but one.
            UsageError: it does not say how much of its parts goes whole.
        """
        what = whole_in_words(budget)
        if budget.leaves_number_open:
            raise UsageError(
                f"--parts {','.join(budget.parts)} tries how many {what} should go, which requires "
                "the model and a text; make the plan with cfsp prune, or say how many with --set "
                f"remove_{what}=N: the sparsity is then of what the others lose"
            )
        parameters_of = parameters_of_whole(source, budget)
        count, all_of_them = len(parameters_of), sum(parameters_of.values())
        least = min(parameters_of.values())
        total, noun = all_of_them, f"{what.removesuffix('s')} parameters"
        if budget.of == "model":
            total, noun = parameter_count(source), "model's parameters"
        wanted = budget.sparsity * total
        most = all_of_them - least
        number = budget.remove_whole
        if number is not None and number >= count:
            raise BudgetError(
                f"cannot remove {number} {what}: {source.label} has {count}, and at "
                f"least one must stay; between 0 and {count - 1} can be removed"
            )
        if number is None and wanted > most + least / 2:
            raise BudgetError(
                f"cannot remove {budget.sparsity:.1%} of the {noun}: at least one of {count} "
                f"{what} must stay; between 0 and {most / total:.1%} can be removed"
            )
        return BlockBudget(parameters_of, number, wanted)

    def is_met_by(self, removed: Collection[int]) -> bool:
        """Return whether removing another one would not come closer."""
        staying = [n for block, n in self.parameters_of.items() if block not in removed]
        if len(staying) <= 1:
            return True
        if self.count is not None:
            return len(removed) >= self.count
        missing = self.parameters - (sum(self.parameters_of.values()) - sum(staying))
        return missing < sum(staying) / len(staying) / 2


def whole_in_words(budget: Budget) -> str:
    """Return what may go whole."""
    return "attentions" if budget.whole_part == "attention" else "blocks"


def parameters_of_whole(source: WeightSource, budget: Budget) -> dict[int, int]:
    """Return the parameters of everything that may go whole, by its block."""
    if budget.whole_part == "attention":
        return parameters_of_attentions(source)
    return dict(enumerate(parameters_of_blocks(source)))

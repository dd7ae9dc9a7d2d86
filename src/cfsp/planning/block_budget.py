"""How many whole blocks a budget removes.

Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget


@dataclass(frozen=True)
class BlockBudget:
    """When enough blocks are removed.

    Attributes:
        parameters_L: those of every block.
        count: how many blocks go; None where `parameters` says it.
        parameters: how many parameters go, to within half a block.
    """

    parameters_L: tuple[int, ...]
    count: int | None
    parameters: float

    @staticmethod
    def of(source: WeightSource, budget: Budget) -> BlockBudget:
        """Return what a budget whose parts have blocks removes of a model.

        Raises:
            BudgetError: more than all blocks but one.
            UsageError: it does not say how much of its parts is blocks.
        """
        if budget.leaves_blocks_open:
            raise UsageError(
                f"--parts {','.join(budget.parts)} tries how many blocks should go, which requires "
                "the model and a text; make the plan with cfsp prune, or say how many with --set "
                "remove_blocks=N: the sparsity is then of what the others lose"
            )
        parameters_L = tuple(parameters_of_blocks(source))
        blocks, all_of_them = len(parameters_L), sum(parameters_L)
        total, noun = all_of_them, "block parameters"
        if budget.of == "model":
            total, noun = parameter_count(source), "model's parameters"
        wanted = budget.sparsity * total
        most = all_of_them - min(parameters_L)
        if budget.remove_blocks is not None and budget.remove_blocks >= blocks:
            raise BudgetError(
                f"cannot remove {budget.remove_blocks} blocks: {source.label} has {blocks}, and at "
                f"least one must stay; between 0 and {blocks - 1} can be removed"
            )
        if budget.remove_blocks is None and wanted > most + min(parameters_L) / 2:
            raise BudgetError(
                f"cannot remove {budget.sparsity:.1%} of the {noun}: at least one of {blocks} "
                f"blocks must stay; between 0 and {most / total:.1%} can be removed"
            )
        return BlockBudget(parameters_L, budget.remove_blocks, wanted)

    def is_met_by(self, removed: Collection[int]) -> bool:
        """Return whether removing another block would not come closer."""
        staying = [n for block, n in enumerate(self.parameters_L) if block not in removed]
        if len(staying) <= 1:
            return True
        if self.count is not None:
            return len(removed) >= self.count
        missing = self.parameters - (sum(self.parameters_L) - sum(staying))
        return missing < sum(staying) / len(staying) / 2

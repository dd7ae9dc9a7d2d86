"""What goes whole: how many blocks, attentions or experts a budget removes.

Shapes: L blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.stored_blocks import (
    parameters_of_an_expert,
    parameters_of_attentions,
    parameters_of_blocks,
)
from cfsp.errors import BudgetError, UsageError

if TYPE_CHECKING:
    from cfsp.architecture.found import Unit
    from cfsp.calibration.statistics import Removal
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget, WholePart

# What may go next: a block, or the attention of one.
Candidate = tuple["WholePart", int]


@dataclass(frozen=True)
class RemovedWhole:
    """What goes whole.

    Attributes:
        blocks: indices of the blocks that go, ascending.
        attentions: of the blocks that stay and whose attentions go, ascending.
        experts: how many routed experts go of every block that stays and has some.
    """

    blocks: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    experts: int = 0

    @staticmethod
    def of(removals: Iterable[Removal], experts: int = 0) -> RemovedWhole:
        """Return what is gone after some removals, beside experts."""
        removed = RemovedWhole(experts=experts)
        for each in removals:
            removed = removed.plus((each.part, each.block))
        return removed

    def plus(self, candidate: Candidate) -> RemovedWhole:
        """Return what is gone when another one goes; with a block its attention is."""
        part, block = candidate
        blocks, attentions = set(self.blocks), set(self.attentions)
        (blocks if part == "blocks" else attentions).add(block)
        attentions -= blocks
        return replace(self, blocks=tuple(sorted(blocks)), attentions=tuple(sorted(attentions)))

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> RemovedWhole:
        """Return what was written as JSON types."""
        blocks, attentions = tuple(fields["blocks"]), tuple(fields["attentions"])
        return RemovedWhole(blocks, attentions, fields["experts"])

    @property
    def touched(self) -> int:
        """How many blocks lose something."""
        return len(self.blocks) + len(self.attentions)

    @property
    def parts(self) -> tuple[WholePart, ...]:
        """Of which parts something goes one by one."""
        gone: dict[WholePart, tuple[int, ...]] = {
            "attention": self.attentions,
            "blocks": self.blocks,
        }
        return tuple(part for part, blocks in gone.items() if blocks)

    def counted(self, budget: Budget) -> str:
        """Return in words how many go of what a budget may remove."""
        named = [_counted(budget, len(self.blocks), len(self.attentions))]
        if budget.removes_experts:
            named.insert(0, f"{counted(self.experts, 'experts')} of each block")
        return ", ".join(filter(None, named))

    def takes(self, unit: Unit) -> bool:
        """Return whether a unit of the model goes with it."""
        return unit.block in self.blocks or (unit.part == "kv" and unit.block in self.attentions)


@dataclass(frozen=True)
class WholeSizes:
    """The parameters of everything that may go whole one by one, by its block.

    Those of experts that go do not count.

    Attributes:
        block_of: those of blocks, with their attentions; empty where blocks may not go.
        attention_of: those of attentions; empty where attentions may not go by themselves.
    """

    block_of: Mapping[int, int]
    attention_of: Mapping[int, int]

    @staticmethod
    def of(source: WeightSource, parts: Sequence[WholePart], experts: int = 0) -> WholeSizes:
        """Return the sizes of a model's blocks, attentions, or both.

        Args:
            source: the model.
            parts: of which.
            experts: how many go of every block.
        """
        block_of = dict(enumerate(parameters_of_blocks(source))) if "blocks" in parts else {}
        if block_of and experts:
            for block, each in parameters_of_an_expert(source).items():
                block_of[block] -= experts * each
        return WholeSizes(
            block_of, parameters_of_attentions(source) if "attention" in parts else {}
        )

    @cached_property
    def total(self) -> int:
        """The parameters of all that may go."""
        return sum((self.block_of or self.attention_of).values())

    @cached_property
    def most(self) -> int:
        """The parameters of all but the smallest, which stays."""
        return self.total - min((self.block_of or self.attention_of).values())

    @cached_property
    def largest(self) -> int:
        """The parameters of the largest that may go."""
        return max((self.block_of or self.attention_of).values())

    def candidates(self, removed: RemovedWhole) -> list[Candidate]:
        """Return what may go next, in a definite order."""
        attentions = self.attention_of.keys() - {*removed.blocks, *removed.attentions}
        blocks = self.block_of.keys() - {*removed.blocks}
        return [
            *(("attention", block) for block in sorted(attentions)),
            *(("blocks", block) for block in sorted(blocks)),
        ]

    def leaves_some(self, removed: RemovedWhole) -> bool:
        """Return whether a block stays, and an attention where these may go by themselves."""
        staying = self.attention_of.keys() - {*removed.blocks, *removed.attentions}
        has_block = not self.block_of or len(removed.blocks) < len(self.block_of)
        return has_block and (not self.attention_of or bool(staying))

    def parameters(self, removed: RemovedWhole) -> int:
        """Return how many parameters go with blocks and attentions."""
        blocks = sum(self.block_of[block] for block in removed.blocks)
        return blocks + sum(self.attention_of[block] for block in removed.attentions)

    def parameters_with(self, removed: RemovedWhole, candidate: Candidate) -> int:
        """Return how many more parameters go if another one does."""
        return self.parameters(removed.plus(candidate)) - self.parameters(removed)


@dataclass(frozen=True)
class RemovalBudget:
    """When enough blocks or attentions are removed.

    Attributes:
        sizes: of everything that may go.
        counts: how many blocks go, and how many attentions of others; None where `parameters` says
            it.
        parameters: how many parameters go, to within half of what goes.
    """

    sizes: WholeSizes
    counts: tuple[int, int] | None
    parameters: float

    @staticmethod
    def of(source: WeightSource, budget: Budget) -> RemovalBudget:
        """Return what a budget by which blocks or attentions go removes of a model.

        Raises:
            BudgetError: more than all but one.
            UsageError: it does not say how much of its parts goes whole.
        """
        check_is_definite(budget)
        experts = budget.remove_experts or 0
        sizes = WholeSizes.of(source, budget.whole_parts, experts)
        of_one = sizes.block_of or sizes.attention_of
        count, least = len(of_one), min(of_one.values())
        noun = f"{'block' if sizes.block_of else 'attention'} parameters"
        total, beside = sizes.total, 0
        if budget.of == "model":
            total, noun = parameter_count(source), "model's parameters"
            beside = parameters_with_experts(source, experts)
        wanted = budget.sparsity * total - beside
        most = sizes.most
        counts = budget.remove_whole
        noun_of_one = "blocks" if sizes.block_of else "attentions"
        if counts is not None and sum(counts) >= count:
            raise BudgetError(
                f"cannot remove {_counted(budget, *counts)}: "
                f"{source.label} has {count} {noun_of_one}, and at least one must stay; between 0 "
                f"and {count - 1} can be removed"
            )
        if counts is None and wanted > most + least / 2:
            raise BudgetError(
                f"cannot remove {budget.sparsity:.1%} of the {noun}: at least one of {count} "
                f"{noun_of_one} must stay; between 0 and {(beside + most) / total:.1%} can be "
                "removed"
            )
        return RemovalBudget(sizes, counts, wanted)

    def has_room_for(self, removed: RemovedWhole, candidate: Candidate) -> bool:
        """Return whether removing another one comes closer to the budget."""
        after = removed.plus(candidate)
        if not self.sizes.leaves_some(after):
            return False
        if self.counts is not None:
            # An attention that is one too many may go with its block later.
            return len(after.blocks) <= self.counts[0] and after.touched <= sum(self.counts)
        missing = self.parameters - self.sizes.parameters(removed)
        return self.sizes.parameters_with(removed, candidate) <= 2 * missing

    def is_met_by(self, removed: RemovedWhole) -> bool:
        """Return whether removing another one of the largest would not come closer."""
        if self.counts is not None:
            return len(removed.blocks) >= self.counts[0] and removed.touched >= sum(self.counts)
        sizes = [
            self.sizes.parameters_with(removed, candidate)
            for candidate in self.sizes.candidates(removed)
            if self.sizes.leaves_some(removed.plus(candidate))
        ]
        return not sizes or self.parameters - self.sizes.parameters(removed) < max(sizes) / 2


def check_is_definite(budget: Budget) -> None:
    """Check that a budget says how much of its parts goes whole.

    Raises:
        UsageError: it is to be tried.
    """
    if budget.leaves_number_open:
        raise UsageError(
            f"--parts {','.join(budget.parts)} tries how many {whole_in_words(budget)} should go, "
            "which requires the model and a text; make the plan with cfsp prune, or say how many "
            f"with {counts_in_words(budget)}: the sparsity is then of what the others lose"
        )


def with_counts(budget: Budget, removed: RemovedWhole) -> Budget:
    """Return the budget that says how many go whole; its sparsity is then of the others."""
    return replace(
        budget,
        remove_blocks=len(removed.blocks) if budget.removes_blocks else None,
        remove_attentions=len(removed.attentions) if "attention" in budget.parts else None,
        remove_experts=removed.experts if budget.removes_experts else None,
        of="ffn",
    )


def parameters_with_experts(source: WeightSource, experts: int) -> int:
    """Return how many parameters go with so many experts of every block."""
    return experts * sum(parameters_of_an_expert(source).values()) if experts else 0


def whole_in_words(budget: Budget) -> str:
    """Return what may go whole; of experts only where their number is open."""
    return " and ".join(_open_words(budget))


def counts_in_words(budget: Budget) -> str:
    """Return the options that say how many go whole; without channels the rest follows."""
    words = _open_words(budget) if budget.removes_channels else ["experts"]
    return " ".join(f"--set remove_{word}=N" for word in words)


def _counted(budget: Budget, blocks: int, attentions: int) -> str:
    """Return how many go of what a budget may remove, in words."""
    counts = {"blocks": blocks, "attentions": attentions}
    return " and ".join(counted(counts[word], word) for word in _words(budget))


def _open_words(budget: Budget) -> list[str]:
    return [*_words(budget), *(["experts"] if budget.leaves_experts_open else [])]


def _words(budget: Budget) -> list[str]:
    words = {"blocks": "blocks", "attention": "attentions"}
    return [word for part, word in words.items() if part in budget.parts]

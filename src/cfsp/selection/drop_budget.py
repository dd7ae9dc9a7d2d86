"""When enough blocks or attentions are dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cfsp.architecture.block_names import counted
from cfsp.checkpoint.reading import parameter_count
from cfsp.errors import BudgetError
from cfsp.planning.candidate import NOTHING, Droppable, Dropped, DropSizes

if TYPE_CHECKING:
    from cfsp.calibration.statistics import Removal
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import WholePart

_NOUNS: dict[WholePart, str] = {"blocks": "blocks", "attention": "attention layers"}


@dataclass(frozen=True)
class DropBudget:
    """When enough blocks or attentions are dropped."""

    parts: tuple[WholePart, ...]  # that may go
    sizes: DropSizes
    parameters: float  # that go, to within half of what goes
    count: int | None = None  # of the one part; None where `parameters` says it

    @staticmethod
    def of_count(
        source: WeightSource, part: WholePart, count: int, keep: Sequence[str] = ()
    ) -> DropBudget:
        """Return the budget by which so many blocks, or attentions, go."""
        sizes = DropSizes.of(source, [part], keep)
        have, noun = len(sizes.block_of or sizes.attention_of), _NOUNS[part]
        most = have if sizes.some_stay else have - 1
        if count > most:
            stay = "what --keep names" if sizes.some_stay else "at least one"
            raise BudgetError(
                f"cannot remove {counted(count, noun)}: of the {noun} of {source.label} {stay} "
                f"must stay; between 0 and {most} can be removed"
            )
        return DropBudget((part,), sizes, 0.0, count)

    @staticmethod
    def of_share(
        source: WeightSource,
        parts: Sequence[WholePart],
        share: float,
        *,
        of_model: bool = False,
        keep: Sequence[str] = (),
    ) -> DropBudget:
        """Return the budget by which a share goes of the parameters of all that may go.

        With `of_model` it is a share of all parameters of the model.
        """
        sizes = DropSizes.of(source, parts, keep)
        of_one = sizes.block_of or sizes.attention_of
        total = parameter_count(source) if of_model else sizes.total
        if share * total > sizes.most + min(of_one.values(), default=0) / 2:
            owner = "block" if sizes.block_of else "attention"
            noun = "model's parameters" if of_model else f"{owner} parameters"
            things = _NOUNS["blocks" if sizes.block_of else "attention"]
            stay = f"at least one of {len(of_one)} {things}"
            raise BudgetError(
                f"cannot remove {share:.1%} of the {noun}: "
                f"{'what --keep names' if sizes.some_stay else stay} must stay; between 0 and "
                f"{sizes.most / total:.1%} can be removed"
            )
        return DropBudget(tuple(parts), sizes, share * total)

    def has_room_for(self, dropped: Dropped, droppable: Droppable) -> bool:
        """Return whether dropping another one comes closer to the budget."""
        after = dropped.plus(droppable)
        if not self.sizes.leaves_some(after):
            return False
        if self.count is not None:
            return len(after) <= self.count
        missing = self.parameters - self.sizes.parameters(dropped)
        return self.sizes.parameters_with(dropped, droppable) <= 2 * missing

    def is_met_by(self, dropped: Dropped) -> bool:
        """Return whether dropping another one of the largest would not come closer."""
        if self.count is not None:
            return len(dropped) >= self.count
        sizes = [
            self.sizes.parameters_with(dropped, droppable)
            for droppable in self.sizes.droppable(dropped)
            if self.sizes.leaves_some(dropped.plus(droppable))
        ]
        return not sizes or self.parameters - self.sizes.parameters(dropped) < max(sizes) / 2

    def first(self, order: Iterable[Removal]) -> list[Removal] | None:
        """Return the first of an order that come closer to the budget, each in its turn.

        None if the order is too short.
        """
        dropped, taken = NOTHING, []
        for each in order:
            if self.has_room_for(dropped, (each.part, each.block)):
                taken.append(each)
                dropped = dropped.plus((each.part, each.block))
        return taken if self.is_met_by(dropped) else None


def drops_in_words(parts: Sequence[WholePart]) -> str:
    """Return what may be dropped."""
    return " and ".join(noun for part, noun in _NOUNS.items() if part in parts)

"""A goal that has been resolved: the budget, and what was tried on the way to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cfsp.settings import Budget


@dataclass(frozen=True)
class Attempt:
    """One sparsity that was tried.

    Attributes:
        sparsity: fraction that goes: of the channels of what stays or, where none may go, of the
            parameters of all that may go whole.
        parameters: of the model that would be left.
        value: what the goal is about: loss increase in nats per token, or predicted speed-up.
        fits: whether the goal is met.
    """

    sparsity: float
    parameters: int
    value: float
    fits: bool


@dataclass(frozen=True)
class Resolution:
    """What a goal came to.

    Attributes:
        budget: what to remove.
        goal: name of the goal, as the option is called.
        asked: its value.
        tried: in the order in which it was tried.
        conditions: what the values were measured on, as JSON types.
    """

    budget: Budget
    goal: str
    asked: float
    tried: tuple[Attempt, ...]
    conditions: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Resolution:
        """Return what `to_json` made."""
        return cls(
            Budget(**fields["budget"]),
            fields["goal"],
            fields["asked"],
            tuple(Attempt(**entry) for entry in fields["tried"]),
            fields["conditions"],
        )

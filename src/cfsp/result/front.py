"""The Pareto front: models that no other beats in both of two things."""

from __future__ import annotations

from collections.abc import Sequence


def pareto_front(size_and_loss: Sequence[tuple[float, float]]) -> list[bool]:
    """Return for each model whether no other is as small and as good and better in one of both.

    Args:
        size_and_loss: two numbers of each model; less is better in both.
    """
    return [
        not any(
            other_size <= size and other_loss <= loss and (other_size, other_loss) != (size, loss)
            for other_size, other_loss in size_and_loss
        )
        for size, loss in size_and_loss
    ]

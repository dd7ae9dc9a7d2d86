"""Means and paired differences with their standard errors: every formula of comparisons.

What is compared was measured on the same windows or documents, so that a difference is taken
window by window, or document by document, before its standard error is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple


class Number(NamedTuple):
    """A number, mostly a mean, and its standard error."""

    value: float
    stderr: float | None = None  # none of what was counted, or of a single window or document


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    """Return values by name as JSON types, rounded; a `Number` is a `value` with its `stderr`."""

    def plain(each: Any) -> Any:
        each = each._asdict() if isinstance(each, Number) else each
        if isinstance(each, dict):
            return as_json(each)
        return round(each, 6) if isinstance(each, float) else each

    return {name: plain(each) for name, each in found.items()}


def mean(values: Sequence[float]) -> Number:
    """Return the mean of documents: the standard error is s / sqrt(n), with n - 1 in s."""
    return per_count(values, [1] * len(values))


def per_count(sums: Sequence[float], counts: Sequence[int]) -> Number:
    """Return the mean over tokens of sums s over W windows, each over a number n of tokens.

    It is r = sum(s) / sum(n). Windows are independent, tokens in a window are not, so the
    standard error is that of a ratio: sqrt(W / (W - 1) sum((s - r n)^2)) / sum(n).
    """
    total = sum(counts)
    ratio = math.fsum(sums) / total
    windows = len(sums)
    if windows < 2:
        return Number(ratio)
    squares = math.fsum((s - ratio * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return Number(ratio, math.sqrt(windows / (windows - 1) * squares) / total)


def difference(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return second - first, one by one."""
    return [b - a for a, b in zip(first, second, strict=True)]


def mean_of_tasks(of_tasks: Sequence[Number]) -> Number:
    """Return the mean over tasks, each with the same weight.

    Documents of different tasks are independent: the standard error is sqrt(sum(se^2)) / tasks.
    """
    errors = [each.stderr for each in of_tasks if each.stderr is not None]
    known = len(errors) == len(of_tasks)
    error = math.sqrt(math.fsum(each**2 for each in errors)) / len(of_tasks) if known else None
    return Number(fmean(each.value for each in of_tasks), error)

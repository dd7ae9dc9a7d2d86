"""Which runs a page shows in detail when there are more than anybody would read."""

from __future__ import annotations

from collections.abc import Sequence

from cfsp.report.run_facts import RunFacts
from cfsp.sweep.front import pareto_front

# Columns side by side, drawings under each other.
MOST_IN_DETAIL = 8


def runs_in_detail(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Return all runs, or `MOST_IN_DETAIL` of them, from the smallest to the largest.

    Those come from the runs that no other beats in size and in perplexity on some text; where
    nothing was measured, from all.
    """
    if len(runs) <= MOST_IN_DETAIL:
        return list(runs)
    best = {index for text in _texts(runs) for index in _front(runs, text)}
    chosen = [runs[index] for index in sorted(best)] or list(runs)
    chosen.sort(key=_parameters)
    last = len(chosen) - 1
    count = min(MOST_IN_DETAIL, len(chosen))
    return [chosen[round(step * last / max(1, count - 1))] for step in range(count)]


def _texts(runs: Sequence[RunFacts]) -> list[str]:
    return list(dict.fromkeys(text for run in runs for text in run.measured.perplexity))


def _front(runs: Sequence[RunFacts], text: str) -> list[int]:
    """Return the numbers of the runs on one text's front."""
    measured = [
        index
        for index, run in enumerate(runs)
        if "after" in run.measured.perplexity.get(text, {}) and "parameters_after" in run.manifest
    ]
    front = pareto_front(
        [(_parameters(runs[i]), runs[i].measured.perplexity[text]["after"]) for i in measured]
    )
    return [index for index, best in zip(measured, front, strict=True) if best]


def _parameters(run: RunFacts) -> float:
    return float(run.manifest.get("parameters_after", 0))

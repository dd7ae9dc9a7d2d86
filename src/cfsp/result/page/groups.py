"""Runs of one original, shown together: which of them in detail, and their charts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cfsp.result.conditions import Conditions
from cfsp.result.names import public_name
from cfsp.result.page.block_chart import block_chart
from cfsp.result.page.chart import Chart
from cfsp.result.page.curves import pareto_chart, recovery_chart
from cfsp.result.page.repair_chart import repair_chart
from cfsp.result.runs import RunFacts, measured_conditions
from cfsp.result.tables import pareto_front

# More are neither columns side by side nor drawings under each other that anybody would read.
MOST_IN_DETAIL = 8


@dataclass(frozen=True)
class ModelGroup:
    """Runs of one original, and their charts."""

    base: str
    runs: Sequence[RunFacts]
    detailed: Sequence[RunFacts]  # that charts by block and manifests are of
    charts: Sequence[Chart]

    @property
    def brief(self) -> list[RunFacts]:
        """The runs that are not shown in detail."""
        shown = {run.name for run in self.detailed}
        return [run for run in self.runs if run.name not in shown]


def group_runs(runs: Sequence[RunFacts]) -> list[ModelGroup]:
    """Put runs of the same original together, and draw each group's charts."""
    by_base: dict[str, list[RunFacts]] = {}
    for run in runs:
        by_base.setdefault(run.base_fingerprint, []).append(run)
    groups = []
    for group in by_base.values():
        detailed = runs_in_detail(group)
        pruned = _without_recovered_twins(detailed)
        charts = (
            pareto_chart(group),
            block_chart(pruned),
            block_chart(pruned, "kv"),
            repair_chart(pruned),
            recovery_chart(detailed),
        )
        shown = [chart for chart in charts if chart is not None]
        groups.append(ModelGroup(public_name(group[0].base_name), group, detailed, shown))
    return groups


def _without_recovered_twins(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Leave out recovered runs whose plan and repair another run has: recovery changes neither."""
    shown: list[RunFacts] = []
    for run in sorted(runs, key=lambda each: bool(each.recovery_history)):
        known = [(other.plan, other.repair_steps) for other in shown]
        if not run.recovery_history or (run.plan, run.repair_steps) not in known:
            shown.append(run)
    return shown


def runs_in_detail(runs: Sequence[RunFacts]) -> list[RunFacts]:
    """Return all runs, or `MOST_IN_DETAIL` of them, from the smallest to the largest.

    Those come from the runs that no other beats in size and in perplexity under some conditions;
    where nothing was measured, from all.
    """
    if len(runs) <= MOST_IN_DETAIL:
        return list(runs)
    best = {index for each in measured_conditions(runs) for index in _front(runs, each)}
    chosen = [runs[index] for index in sorted(best)] or list(runs)
    chosen.sort(key=_parameters)
    last = len(chosen) - 1
    count = min(MOST_IN_DETAIL, len(chosen))
    return [chosen[round(step * last / max(1, count - 1))] for step in range(count)]


def _front(runs: Sequence[RunFacts], conditions: Conditions) -> list[int]:
    """Return the numbers of the runs on the front under some conditions."""
    measured = [
        (index, (_parameters(run), perplexity))
        for index, run in enumerate(runs)
        if (perplexity := run.perplexity(conditions)) is not None and _parameters(run)
    ]
    front = pareto_front([values for _, values in measured])
    return [index for (index, _), best in zip(measured, front, strict=True) if best]


def _parameters(run: RunFacts) -> float:
    return float(run.manifest.get("parameters_after", 0))

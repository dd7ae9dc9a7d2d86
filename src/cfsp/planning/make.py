"""Planning: from statistics and a candidate to a plan, in seconds, without a forward pass.

how many channels units keep (`widths`) -> which (`channels`) -> the plan (`plan_file`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cfsp.calibration.observed import UnitStatistics
from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import EARLIER, WeightSource, fingerprint
from cfsp.errors import StatisticsError
from cfsp.planning.candidate import Candidate
from cfsp.planning.channels import choose_channels, few_tokens, warn_of_few_tokens
from cfsp.planning.experts import lost_output, warn_of_lost_experts
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.planning.widths import UnitWidths, definite_criterion, model_size, plan_widths
from cfsp.progress import item_progress
from cfsp.settings import DEFAULT_PARTS, UNIT_PARTS, Budget, Criterion
from cfsp.streaming.block_proof import check_experts_can_go


@dataclass(frozen=True)
class Planner:
    """Turns candidates into plans: a model, its statistics, and by what is chosen.

    Attributes:
        source: the model; its FFN weights are read one unit at a time.
        statistics: its calibration.
        budget: what may go, and what widths look like.
        criterion: what counts as important, by its definite metrics.
    """

    source: WeightSource
    statistics: Statistics
    budget: Budget
    criterion: Criterion

    @staticmethod
    def of(
        source: WeightSource, statistics: Statistics, budget: Budget, criterion: Criterion
    ) -> Planner:
        """Return what plans by these statistics.

        Raises:
            StatisticsError: they belong to another model.
        """
        check_statistics_fit(source, statistics)
        criterion = definite_criterion(criterion, statistics, budget)
        return Planner(source, statistics, budget, criterion)

    def widths(self, candidate: Candidate) -> UnitWidths:
        """Return how many channels every unit keeps; errors are those of `plan_widths`."""
        return plan_widths(self.source, self.statistics, candidate, self.budget, self.criterion)

    def channels(self, candidate: Candidate, widths: UnitWidths) -> Iterator[tuple[int, ...]]:
        """Yield the channels of every unit that stay; errors are those of `choose_channels`."""
        for unit, width in enumerate(widths.kept_U):
            yield choose_channels(
                self.source,
                unit,
                self.statistics.units[unit],
                width,
                self.criterion,
                candidate.experts,
            )

    def plan(
        self, candidate: Candidate, on_unit: Callable[[], object] = lambda: None
    ) -> PruningPlan:
        """Return the plan of a candidate.

        Args:
            candidate: how much goes.
            on_unit: is called after each unit.

        Raises:
            BudgetError: so much cannot go.
            StatisticsError: the criterion requires what the statistics do not have.
            UsageError: a metric is unknown.
        """
        widths, kept = self.widths(candidate), []
        for kept_K in self.channels(candidate, widths):
            kept.append(kept_K)
            on_unit()
        return self.assemble(candidate, widths, kept)

    def plan_for_people(self, candidate: Candidate) -> PruningPlan:
        """Return the plan of a candidate, showing progress and what people should know of it."""
        with item_progress("plan", len(self.source.units), "FFN") as bar:
            plan = self.plan(candidate, bar.update)
        warn_of_few_tokens(plan)
        warn_of_lost_experts(plan)
        return plan

    def assemble(
        self, candidate: Candidate, widths: UnitWidths, kept: Sequence[tuple[int, ...]]
    ) -> PruningPlan:
        """Return the plan that widths and channels amount to, and what goes whole."""
        source, statistics = self.source, self.statistics
        parts = tuple(
            part for part in self.budget.parts if part in candidate.parts or part not in UNIT_PARTS
        )
        size = model_size(source)
        has_one_ffn_each = statistics.has_one_unit_each and not source.architecture.has_attentions
        units = [
            _without_gone_experts(
                UnitPlan(
                    block=unit.block,
                    width=unit.width,
                    kept=kept_K,
                    distance=distance,
                    importance=importance,
                    ffns=observed.ffns,
                    few_tokens=few_tokens(observed),
                    path="" if has_one_ffn_each else unit.path,
                    cost=cost,
                    part=unit.part,
                ),
                observed,
            )
            for unit, observed, kept_K, distance, importance, cost in zip(
                source.units,
                statistics.units,
                kept,
                widths.distance_U,
                widths.importance_U,
                size.cost_U,
                strict=True,
            )
        ]
        plan = PruningPlan(
            model=ModelIdentity.of(source),
            criterion={
                **self._written(),
                "clamp": self.criterion.chosen_clamp,
                "sparsity": candidate.sparsity,
                "of": self._of(candidate),
                # Of which all new FFN widths are multiples.
                "multiple": math.gcd(*size.of_parts(("ffn",)).multiple_U(self.budget)) or 1,
                **({} if parts == DEFAULT_PARTS else {"parts": list(parts)}),
                **({"keep": list(self.budget.keep)} if self.budget.keep else {}),
            },
            calibration=asdict(statistics.record),
            units=tuple(units),
            removed_blocks=candidate.dropped.blocks,
        )
        if plan.kept_experts is not None:
            check_experts_can_go(source, plan.experts_of_blocks, plan.removed_blocks)
        return plan

    def _of(self, candidate: Candidate) -> str:
        """Return what the sparsity of a candidate is a share of."""
        if candidate.parts:
            return "ffn"
        # An attention is a part of its block.
        return "blocks" if "blocks" in self.budget.parts else self.budget.parts[0]

    def _written(self) -> dict[str, Any]:
        """Return what a plan says of the criterion; of removal only where something may drop."""
        fields = asdict(self.criterion)
        if not self.budget.whole_parts:
            del fields["removal"]
        return fields


def _without_gone_experts(unit: UnitPlan, observed: UnitStatistics) -> UnitPlan:
    """Return the plan of a unit that says what the experts added that go whole, if some do."""
    if not unit.loses_experts:
        return unit
    return replace(unit, lost_output=round(lost_output(observed, unit.kept_ffns), 6))


def check_statistics_fit(source: WeightSource, statistics: Statistics) -> None:
    """Check that statistics belong to a model.

    Raises:
        StatisticsError: they belong to another one.
    """
    found = fingerprint(source)
    shapes = [(unit.block, unit.part, unit.ffns, unit.width) for unit in statistics.units]
    expected = [(unit.block, unit.part, unit.ffns, unit.columns) for unit in source.units]
    have, need = ({unit.part for unit in of.units} for of in (statistics, source))
    if statistics.record.fingerprint == found and have != need:
        raise StatisticsError(
            f"the statistics are of the parts {', '.join(sorted(have))}, expected "
            f"{', '.join(sorted(need))}; calibrate with the same --parts"
        )
    if statistics.record.fingerprint == found and any(
        unit.expert_axes and not len(seen.output_norm_E)
        for unit, seen in zip(source.units, statistics.units, strict=False)
    ):
        raise StatisticsError(
            "the statistics do not have what the experts add; calibrate with the same --parts"
        )
    if statistics.record.fingerprint != found or shapes != expected:
        raise StatisticsError(
            f"the statistics were made for {statistics.record.model} "
            f"({statistics.record.fingerprint}), not for {source.label} ({found}), "
            f"{EARLIER} them; calibrate this model"
        )

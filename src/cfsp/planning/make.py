"""Planning: from statistics and a candidate to a plan, in seconds, without a forward pass.

how many channels units keep -> which (`channels`) -> the plan (`plan_file`)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from cfsp.calibration.statistics import Statistics
from cfsp.checkpoint.reading import WeightSource, ffn_parameters_per_channel
from cfsp.checkpoint.skeleton import stock_config
from cfsp.checkpoint.stock_keys import WidthSearch
from cfsp.errors import StatisticsError
from cfsp.planning.allocation import ModelSize, UnitSize, allocate
from cfsp.planning.candidate import NOTHING, Candidate, Dropped, kept_by, parameters_dropped
from cfsp.planning.importance import choose_channels, few_tokens, importance_of_units, lost_output
from cfsp.planning.plan_file import ModelIdentity, PruningPlan
from cfsp.planning.unit_plan import UnitPlan
from cfsp.progress import item_progress
from cfsp.settings import (
    ANGULAR,
    AUTO_METRIC,
    DEFAULT_PARTS,
    DIVERGENCE,
    RUNS,
    SENSITIVITY,
    UNIT_PARTS,
    Budget,
    Criterion,
    Part,
)
from cfsp.streaming.block_proof import check_experts_can_go

# torch multiplies experts in groups only if rows are whole 16 bytes: 8 values of 16 bits.
EXPERTS_GRAIN = 8
_ANY = Budget()


def model_size(
    source: WeightSource, budget: Budget = _ANY, dropped: Dropped = NOTHING
) -> ModelSize:
    """Return the numbers that a budget of channels is about, beside what goes whole."""
    stays = kept_by(source, budget.keep).units
    columns = source.units, ffn_parameters_per_channel(source), multiples(source, budget)
    units = tuple(
        UnitSize(
            unit.width,
            channel_parameters,
            multiple,
            grain=EXPERTS_GRAIN if unit.routed else 1,
            part=unit.part,
            stays=index in stays,
        )
        for index, (unit, channel_parameters, multiple) in enumerate(zip(*columns, strict=True))
        if not dropped.takes(unit)
    )
    return ModelSize(units, source.parameter_count - parameters_dropped(source, dropped))


def multiples(source: WeightSource, budget: Budget) -> list[int]:
    """Return what new widths of every unit are multiples of: KV groups go one by one.

    FFNs of one kind share a number, whichever of them stay. With equal widths they are of a kind
    whose widths one key of a stock config says: a shared expert that is twice as wide as the routed
    ones has to stay so.
    """
    ffns = source.architecture.of_part("ffn")
    kinds = {unit.path: (unit.path, 1) for unit in ffns.units}
    if budget.widths == "equal" and kinds:
        for key, times in WidthSearch(stock_config(source.config), ffns).keys.items():
            kinds |= {path: (key, n // math.gcd(*times.values())) for path, n in times.items()}
    widths: dict[str, list[int]] = {}
    for unit in ffns.units:
        kind, times_of_kind = kinds[unit.path]
        widths.setdefault(kind, []).append(unit.width // times_of_kind)
    number = {kind: budget.multiple_for(of_kind) for kind, of_kind in widths.items()}
    # An attention may have the path of an FFN elsewhere.
    of_ffns = {("ffn", path): number[kind] * times for path, (kind, times) in kinds.items()}
    return [of_ffns.get((unit.part, unit.path), 1) for unit in source.units]


def parameters_of_channels(
    source: WeightSource, parts: Sequence[Part], dropped: Dropped = NOTHING
) -> int:
    """Return the parameters of all channels of these parts beside what goes whole."""
    size = model_size(source, dropped=dropped).of_parts(parts)
    return size.cost_of(size.width_U) * size.parameters_per_cost


class UnitWidths(NamedTuple):
    """How many channels every unit keeps, and why: the coarse half of a decision."""

    distance_U: list[float]  # of its block
    importance_U: list[float]  # normalised, in (0, 1]; 0 of what goes whole
    kept_U: list[int]  # in each FFN; 0 of what goes whole


@dataclass(frozen=True)
class Planner:
    """Turns candidates into plans: a model, its statistics, and by what is chosen."""

    source: WeightSource
    statistics: Statistics
    budget: Budget
    criterion: Criterion  # by its definite metrics

    @staticmethod
    def of(
        source: WeightSource, statistics: Statistics, budget: Budget, criterion: Criterion
    ) -> Planner:
        """Return what plans by these statistics; of metrics that are `auto`, by what they allow."""
        statistics = fitting_statistics(source, statistics)
        if criterion.block_metric == AUTO_METRIC:
            # Statistics that had other parts to choose from may not have that of all.
            of_parts = [statistics.of_part(part).sensitivity for part in budget.channel_parts]
            metric = SENSITIVITY if all((statistics.sensitivity, *of_parts)) else ANGULAR
            criterion = replace(criterion, block_metric=metric)
        return Planner(source, statistics, budget, criterion)

    def widths(self, candidate: Candidate) -> UnitWidths:
        """Return how many channels every unit keeps.

        What goes whole is decided before; the rest is planned as if it were the model.
        """
        dropped, budget = candidate.dropped, self.budget
        size = model_size(self.source, budget, dropped)
        pairs = zip(self.statistics.units, self.source.units, strict=True)
        units = tuple(seen for seen, unit in pairs if not dropped.takes(unit))
        staying = replace(self.statistics, units=units)
        distance_U, importance_U = importance_of_units(
            staying, self.criterion.block_metric, size, candidate.parts or budget.parts
        )
        kept_U = size.width_U
        if candidate.parts:
            asked = replace(budget, sparsity=candidate.sparsity, parts=candidate.parts)
            kept_U = allocate(importance_U, asked, size, self.criterion.clamp)
        planned, rows = zip(distance_U, importance_U, kept_U, strict=True), []
        for unit in self.source.units:
            if dropped.takes(unit):
                alone = unit.block in dropped.attentions
                seen = self.statistics.of_part("kv") if alone else self.statistics
                rows.append((seen.distance_L[unit.block], 0.0, 0))
            else:
                rows.append(next(planned))
        return UnitWidths(*(list(column) for column in zip(*rows, strict=True)))

    def channels(self, candidate: Candidate, widths: UnitWidths) -> Iterator[tuple[int, ...]]:
        """Yield the channels of every unit that stay."""
        of_units = zip(self.source.units, self.statistics.units, widths.kept_U, strict=True)
        for unit, observed, width in of_units:
            yield choose_channels(
                self.source, unit, observed, width, self.criterion, candidate.experts
            )

    def plan(self, candidate: Candidate) -> PruningPlan:
        """Return the plan of a candidate."""
        widths, kept = self.widths(candidate), []
        with item_progress("plan", len(self.source.units), "FFN") as bar:
            for kept_K in self.channels(candidate, widths):
                kept.append(kept_K)
                bar.update()
        return self.assemble(candidate, widths, kept)

    def assemble(
        self, candidate: Candidate, widths: UnitWidths, kept: Sequence[tuple[int, ...]]
    ) -> PruningPlan:
        """Return the plan that widths and channels amount to, and what goes whole."""
        source, size = self.source, model_size(self.source, self.budget)
        plan = PruningPlan(
            model=ModelIdentity.of(source),
            criterion=self._criterion_of(candidate, size),
            calibration=asdict(self.statistics.record),
            units=self._units(widths, kept, size),
            removed_blocks=candidate.dropped.blocks,
        )
        if plan.kept_experts is not None:
            check_experts_can_go(source, plan.experts_of_blocks, plan.removed_blocks)
        return plan

    def _units(
        self, widths: UnitWidths, kept: Sequence[tuple[int, ...]], size: ModelSize
    ) -> tuple[UnitPlan, ...]:
        has_paths = self.source.architecture.has_attentions or not self.statistics.has_one_unit_each
        units = []
        for index, unit in enumerate(self.source.units):
            observed = self.statistics.units[index]
            planned = UnitPlan(
                block=unit.block,
                width=unit.width,
                kept=kept[index],
                distance=widths.distance_U[index],
                importance=widths.importance_U[index],
                ffns=observed.ffns,
                few_tokens=few_tokens(observed),
                path=unit.path if has_paths else "",
                cost=size.cost_U[index],
                part=unit.part,
            )
            if planned.loses_experts:
                lost = round(lost_output(observed, planned.kept_ffns), 6)
                planned = replace(planned, lost_output=lost)
            units.append(planned)
        return tuple(units)

    def _criterion_of(self, candidate: Candidate, size: ModelSize) -> dict[str, object]:
        """Return what a plan says of how it was chosen; of removal only where something may."""
        budget = self.budget
        parts = [part for part in budget.parts if part in candidate.parts or part not in UNIT_PARTS]
        removal = DIVERGENCE if self.statistics.removals_of(budget.whole_part) else RUNS
        return {
            **asdict(self.criterion),
            "clamp": self.criterion.clamp,
            **({"removal": removal} if budget.whole_part else {}),
            "sparsity": candidate.sparsity,
            "of": "ffn" if candidate.parts else budget.parts[-1],
            # Of which all new FFN widths are multiples.
            "multiple": math.gcd(*size.of_parts(("ffn",)).multiple_U) or 1,
            **({} if tuple(parts) == DEFAULT_PARTS else {"parts": parts}),
            **({"keep": list(budget.keep)} if budget.keep else {}),
        }


def fitting_statistics(source: WeightSource, statistics: Statistics) -> Statistics:
    """Return what of statistics a model needs as it was opened; check that they belong to it."""
    record, found = statistics.record, source.fingerprint
    have, need = ({unit.part for unit in of.units} for of in (statistics, source))
    units = tuple(unit for unit in statistics.units if unit.part in need)
    statistics = replace(statistics, units=units)
    shapes = [(unit.block, unit.part, unit.ffns, unit.width) for unit in statistics.units]
    expected = [(unit.block, unit.part, unit.ffns, unit.columns) for unit in source.units]
    if record.fingerprint == found and not have >= need:
        raise StatisticsError(
            f"the statistics are of the parts {', '.join(sorted(have))}, expected "
            f"{', '.join(sorted(need))}; calibrate with the same --parts"
        )
    if record.fingerprint != found or shapes != expected:
        raise StatisticsError(
            f"the statistics were made for {record.model} ({record.fingerprint}), not for "
            f"{source.label} ({found}); calibrate this model"
        )
    pairs = zip(source.units, statistics.units, strict=True)
    if any(unit.expert_axes and not len(seen.output_norm_E) for unit, seen in pairs):
        raise StatisticsError(
            "the statistics do not have what the experts add; calibrate with the same --parts"
        )
    return statistics

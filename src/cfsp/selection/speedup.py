"""Prune as little as makes the model so much faster, by times measured on this machine.

Models of the same shapes with random weights are timed in turns: of several FFN widths, the same in
all blocks, and with half of the blocks. A model's time is a sum over its blocks, so what each saves
is added up:

    t = 1 - sum over parts of mean over units (1 - t_part(what the unit keeps))

where t_part is the time of a model whose units of the part all keep that, relative to the whole
model. Head and overhead are in every t. Between measured points t is taken to be linear.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from cfsp.checkpoint.pruned_config import config_changes
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.skeleton import empty_model
from cfsp.checkpoint.text_config import longest_input_of
from cfsp.errors import BudgetError, UsageError
from cfsp.planning.candidate import Candidate, Dropped, DropSizes
from cfsp.planning.make import Planner, model_size
from cfsp.selection.constraint import (
    STEPS,
    Attempt,
    Constraint,
    DropBudget,
    highest_step,
)
from cfsp.settings import PART_NOUNS, Budget, Part, Phase, TargetSpeedup, TimingConditions, Workload
from cfsp.speed.bench import compare_speed
from cfsp.speed.subjects import HARDLY, Subject
from cfsp.streaming.memory import available_bytes
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.work_dir import WorkDir

WORKLOAD = Workload()
ROUNDS = 5
_FRACTIONS = (0.75, 0.5, 0.25)
_PROCESS_BYTES = 500_000_000  # what a process takes besides its weights
_LEAST_TIME = 0.01  # of the whole model's time; sums of noisy savings may exceed it

# Part -> what every FFN keeps, or how many blocks stay, ascending, and the time of such a model
# relative to the whole one's.
Curves = Mapping[str, Sequence[Sequence[float]]]

log = logging.getLogger(__name__)


def times_faster(
    curves: Curves, source: WeightSource, kept_U: Sequence[int], dropped: Dropped
) -> float:
    """Return how many times faster a model is that keeps this of every unit."""
    blocks = source.architecture.block_count

    def time(kept_U: Sequence[int], count: int) -> float:
        saved = 0.0
        for part, points in curves.items():
            kept = [
                # What a block saves is measured whole.
                unit.width if unit.block in dropped.blocks else kept
                for unit, kept in zip(source.units, kept_U, strict=True)
                if unit.part == part
            ]
            asked, (known, times) = [count] if part == "blocks" else kept, np.transpose(points)
            saved += float((1 - np.interp(asked, known, times)).mean())
        return max(_LEAST_TIME, 1 - saved)

    whole_U = [unit.width for unit in source.units]
    return time(whole_U, blocks) / time(kept_U, blocks - len(dropped.blocks))


@dataclass(frozen=True)
class Speedup(Constraint):
    """The model is predicted to be so many times faster."""

    goal: TargetSpeedup
    runtime: Runtime
    work_dir: WorkDir  # keeps latencies for a run that is resumed

    name = "target_speedup"

    @property
    def needs_statistics(self) -> bool:
        """Whether it depends on a plan: not where blocks go alone."""
        return bool(self.budget.channel_parts)

    @cached_property
    def latencies(self) -> dict[str, Any]:
        """What each part takes, measured by a killed run or now; in the first process alone."""

        def measure() -> dict[str, Any]:
            found = measure_latencies(self.source, self.budget, self.goal.phase, self.runtime)
            share = found["conditions"]["disturbance"]
            # Other programs do not compute where an accelerator does.
            if share > HARDLY and self.runtime.device.type == "cpu":
                log.warning(
                    f"other programs took {share:.0%} of the processors while latencies were "
                    "measured: the prediction is unreliable; repeat it on a quiet machine"
                )
            return found

        with self.work_dir.watch.stage("try"):
            return self.work_dir.once("latencies", measure)

    def check(self) -> None:
        """Check what can be without timing; then time the models, in every process."""
        kinds = sorted({unit.path for unit in self.source.units if unit.part == "ffn"})
        if "ffn" in self.budget.parts and len(kinds) > 1:
            raise UsageError(
                "--target-speedup times models with one FFN width in all blocks, and the FFNs of "
                f"{self.source.label} are of several kinds ({', '.join(kinds)}); give --parts "
                "blocks, or --sparsity and measure with cfsp bench"
            )
        super().check()
        if self.goal.ratio > self._reach(self.budget.parts):
            raise self.too_much()

    def to_drop(self) -> DropBudget:
        """Return how many blocks are enough, whichever go; beside channels half of them."""
        if self.budget.channel_parts:
            return super().to_drop()
        return DropBudget.of_count(self.source, self.budget, self._fewest)

    @cached_property
    def _fewest(self) -> int:
        """How many blocks are enough; asked often, predicted and noted once."""
        sizes = DropSizes.of(self.source, "blocks", self.budget.keep)
        may_go = sorted(sizes.size_of)
        for count in range(1, len(may_go) + sizes.some_stay):
            dropped = Dropped(tuple(may_go[:count]))
            kept_U = [0 if dropped.takes(unit) else unit.width for unit in self.source.units]
            share = sizes.parameters(dropped.blocks) / sizes.total
            if self._is_fast(Candidate(dropped, sparsity=share), kept_U):
                return count
        raise self.too_much()

    def share(self, planner: Planner, parts: Sequence[Part], dropped: Dropped) -> float | None:
        """Return the least share that is enough."""

        def is_enough(step: int) -> bool:
            candidate = Candidate(dropped, 0, tuple(parts), step / STEPS)
            return self._is_fast(candidate, planner.widths(candidate).kept_U)

        if dropped and is_enough(0):
            return 0.0
        size = model_size(self.source, self.budget, dropped).of_parts(parts)
        if all(unit.stays for unit in size.units):  # or all blocks that have some are dropped
            return None
        highest = highest_step(size)
        if not is_enough(highest):
            return None
        return (bisect_left(range(1, highest + 1), True, key=is_enough) + 1) / STEPS

    def _is_fast(self, candidate: Candidate, kept_U: Sequence[int]) -> bool:
        """Predict what becomes of the model with a candidate, and note it."""
        dropped, pairs = candidate.dropped, zip(self.source.units, kept_U, strict=True)
        left = [kept for unit, kept in pairs if not dropped.takes(unit)]
        parameters = model_size(self.source, dropped=dropped).parameters_with(left)
        value = times_faster(self.latencies["curves"], self.source, kept_U, dropped)
        fits = value >= self.goal.ratio
        self.tried.append(Attempt(candidate.sparsity, parameters, value, fits))
        return fits

    def facts(self) -> dict[str, Any]:
        """Return what was asked for, predicted and measured."""
        latency = {
            part: {str(kept): round(time, 4) for kept, time in points}
            for part, points in self.latencies["curves"].items()
        }
        conditions = {"relative_latency": latency, **self.latencies["conditions"]}
        return {
            "goal": self.name,
            "asked": self.goal.ratio,
            "tried": [vars(each) for each in self.tried],
            "conditions": {"phase": self.goal.phase, **conditions},
        }

    def too_much(self) -> BudgetError:
        """Return the error that says how far each part reaches."""
        parts = self.budget.parts
        most = max((each.value for each in self.tried), default=self._reach(parts))
        alone = ", ".join(f"{PART_NOUNS[part]} reach {self._reach((part,)):.2f}" for part in parts)
        ways = ["ask for less"] + (["give --parts ffn,blocks"] if len(parts) == 1 else [])
        ways += ["--keep less"] if self.budget.keep else []
        return BudgetError(
            f"{self.goal.phase} cannot become {self.goal.ratio:g} times faster with --parts "
            f"{','.join(parts)}: it is predicted to be {most:.2f} times faster at most, because "
            f"the rest stays (alone, {alone}); {', or '.join(ways)}"
        )

    def _reach(self, parts: Sequence[Part]) -> float:
        """Return how many times faster it is at best, if these parts go as far as they may."""
        source, keep = self.source, self.budget.keep
        units = model_size(source, self.budget).units
        least_U = [unit.least if unit.part in parts else unit.width for unit in units]
        sizes = DropSizes.of(source, "blocks", keep)
        gone = sorted(sizes.size_of)[not sizes.some_stay :] if "blocks" in parts else ()
        return times_faster(self.latencies["curves"], self.source, least_U, Dropped(tuple(gone)))


def widths_to_measure(widest: int, multiple: int) -> list[int]:
    """Return the least width that a block may have, the widest, and some between, ascending."""
    between = {round(f * widest / multiple) * multiple for f in _FRACTIONS}
    return sorted({multiple, *(w for w in between if multiple < w < widest), widest})


def models_to_time(
    source: WeightSource, budget: Budget
) -> tuple[PreTrainedConfig, list[tuple[Part, int, PreTrainedConfig]]]:
    """Return the whole model, and those with less of each part: which, and what stays of it."""
    units, count = source.units, source.architecture.block_count
    widest = max((unit.width for unit in units if unit.part == "ffn"), default=0)

    def with_at_most(width: int, gone: Sequence[int] = ()) -> PreTrainedConfig:
        widths = [
            width if unit.part == "ffn" and "ffn" in budget.parts else unit.width
            for unit in units
            if unit.block not in gone
        ]
        changes = config_changes(source.config, source.architecture, widths, gone)
        return changes.applied_to(source.config)

    timed: list[tuple[Part, int, PreTrainedConfig]] = []
    if "ffn" in budget.parts:
        multiple = max(model_size(source, budget).multiple_U)
        fewer = reversed(widths_to_measure(widest, multiple)[:-1])
        timed += [("ffn", width, with_at_most(width)) for width in fewer]
    if "blocks" in budget.parts and count > 1:
        stay = (count + 1) // 2
        timed.append(("blocks", stay, with_at_most(widest, range(stay, count))))
    return with_at_most(widest), timed


def measure_latencies(
    source: WeightSource, budget: Budget, phase: Phase, runtime: Runtime
) -> dict[str, Any]:
    """Time models with less of each part; return `Curves` and their conditions, as JSON types."""
    whole, timed = models_to_time(source, budget)
    workload, longest = WORKLOAD, longest_input_of(source.config)
    if longest is not None and workload.prompt + workload.new_tokens > longest:
        new_tokens = min(workload.new_tokens, max(1, longest // 2))
        workload = replace(workload, prompt=max(1, longest - new_tokens), new_tokens=new_tokens)
    # The whole one first: it is what the others are compared to.
    subjects = [
        Subject(whole, "the whole model"),
        *(Subject(model, f"{part} {kept}") for part, kept, model in timed),
    ]
    _check_memory([whole, *(model for *_, model in timed)], runtime)
    dtype = str(runtime.dtype).removeprefix("torch.")
    conditions = TimingConditions(warmups=1, rounds=ROUNDS, device=str(runtime.device), dtype=dtype)
    comparison = compare_speed(subjects, [workload], conditions)
    count = source.architecture.block_count
    widths = [unit.width for unit in source.units if unit.part == "ffn"]
    most = {"ffn": max(widths, default=0), "blocks": count}
    curves: dict[str, list[list[float]]] = {}
    for (part, kept, _), smaller in zip(timed, comparison.models[1:], strict=True):
        time = 1 / smaller.speeds[workload][phase].median_ratio
        if part == "blocks":  # as if all blocks saved what these did
            kept, time = 0, 1 - (1 - time) * count / (count - kept)
        curves.setdefault(part, [[most[part], 1.0]]).append([kept, time])
    return {
        "curves": {part: sorted(points) for part, points in curves.items()},
        "conditions": {
            **vars(workload),
            **comparison.models[0].facts,
            "rounds": ROUNDS,
            "disturbance": round(comparison.disturbance[workload], 4),
        },
    }


def _check_memory(configs: Sequence[PreTrainedConfig], runtime: Runtime) -> None:
    if runtime.device.type != "cpu":
        return
    parameters = sum(
        parameter.numel() for each in configs for parameter in empty_model(each).parameters()
    )
    needed = parameters * runtime.dtype.itemsize + len(configs) * _PROCESS_BYTES
    if needed > (available := available_bytes()):
        raise UsageError(
            f"--target-speedup times {len(configs)} models of different sizes in turns, which "
            f"takes {needed / 1e9:.1f} GB; {available / 1e9:.1f} GB are available: give --sparsity "
            "and measure with cfsp bench"
        )

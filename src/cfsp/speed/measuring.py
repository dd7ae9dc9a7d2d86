"""Interleaved rounds over models, and what comes out of them.

Machines drift. Models therefore take turns, round after round, and the figure to quote is the
median of the ratios within a round. Warm-up runs are not part of the rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median
from typing import Any

from cfsp.progress import item_progress
from cfsp.speed.process import ModelProcess, model_process
from cfsp.speed.subjects import Subject
from cfsp.speed.work import PATIENCE_SECONDS, TOO_BUSY, Conditions, Footprint, Timing, Workload

PHASES = ("prefill", "decode")
# So many rounds that nobody disturbs say enough where there is no patience for all.
_ENOUGH = 3
# A round has one timing of every model.
_Round = list[Timing]


@dataclass(frozen=True)
class Speed:
    """Throughput of one model in one phase and its ratio to the first model, round by round."""

    tokens_per_second: tuple[float, ...]
    ratios: tuple[float, ...]  # to the first model in the same round
    # What the models' sizes promise: FLOPs for prefill, bytes for decoding; NaN if unknown.
    ideal_ratio: float
    too_busy: bool = False  # other programs took so much meanwhile that the ratios say nothing

    @property
    def median_tokens_per_second(self) -> float:
        """Median over rounds."""
        return median(self.tokens_per_second)

    @property
    def median_ratio(self) -> float:
        """Median over rounds; above 1 is faster than the first model."""
        return median(self.ratios)

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "tokens_per_second": round(self.median_tokens_per_second, 3),
            "ratio": round(self.median_ratio, 4),
            "too_busy": self.too_busy,
            "ideal_ratio": None if math.isnan(self.ideal_ratio) else round(self.ideal_ratio, 4),
            "tokens_per_second_by_round": [round(v, 3) for v in self.tokens_per_second],
            "ratio_by_round": [round(v, 4) for v in self.ratios],
        }


@dataclass(frozen=True)
class ModelSpeed:
    """All that was measured of one model."""

    label: str
    footprint: Footprint
    facts: dict[str, Any]  # of its engine
    load_seconds: float  # from start to ready
    first_run: dict[Workload, Timing]
    seconds_to_first_token: dict[Workload, float]  # median over rounds
    speeds: dict[Workload, dict[str, Speed]]  # by phase
    peak_rss_bytes: int  # over everything; mapped files and libraries are in it
    peak_device_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "model": self.label,
            "parameters": self.footprint.parameters,
            "disk_bytes": self.footprint.disk_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "load_seconds": round(self.load_seconds, 3),
            **self.facts,
            "workloads": [
                {
                    **vars(workload),
                    "seconds_to_first_token": round(self.seconds_to_first_token[workload], 5),
                    "first_run_seconds": {
                        phase: round(getattr(self.first_run[workload], phase), 4)
                        for phase in PHASES
                    },
                    **{phase: speed.to_json() for phase, speed in speeds.items()},
                }
                for workload, speeds in self.speeds.items()
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """Models on the same workloads; the first is what the others are compared to."""

    models: tuple[ModelSpeed, ...]
    workloads: tuple[Workload, ...]
    conditions: Conditions
    # Rounds that other programs disturbed are no part of the results, unless nearly all were.
    rounds_given_up: dict[Workload, int]
    # Median fraction of the processors that other programs took in the rounds that count.
    disturbance: dict[Workload, float]

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "conditions": vars(self.conditions),
            "rounds_given_up": list(self.rounds_given_up.values()),
            "disturbance": [round(value, 4) for value in self.disturbance.values()],
            "models": [model.to_json() for model in self.models],
        }


def compare_speed(
    subjects: Sequence[Subject], workloads: Sequence[Workload], conditions: Conditions
) -> Comparison:
    """Time models against each other, each in a process of its own; ratios are to the first."""
    first_runs: dict[Workload, _Round] = {}
    rounds: dict[Workload, list[_Round]] = {}
    given_up: dict[Workload, int] = {}
    with ExitStack() as stack:
        processes = [stack.enter_context(model_process(s, conditions)) for s in subjects]
        total = len(workloads) * (conditions.warmups + conditions.rounds)
        bar = stack.enter_context(item_progress("bench", total, "round"))
        for workload in workloads:
            for _ in range(conditions.warmups):
                timings = [process.run(workload) for process in processes]
                first_runs.setdefault(workload, timings)
                bar.update()
            patience = PATIENCE_SECONDS / len(workloads)
            rounds[workload], given_up[workload] = _rounds(
                processes, workload, conditions, patience, bar.update
            )
        disturbance = {
            workload: median(timing.disturbance for timings in timed for timing in timings)
            for workload, timed in rounds.items()
        }
        most = max(TOO_BUSY, conditions.disturbance)
        models = tuple(
            ModelSpeed(
                subject.label,
                process.footprint,
                process.facts,
                process.load_seconds,
                {workload: timings[number] for workload, timings in first_runs.items()},
                {
                    workload: median(timings[number].prefill for timings in timed)
                    for workload, timed in rounds.items()
                },
                {
                    workload: _speeds(
                        processes, number, workload, timed, disturbance[workload] > most
                    )
                    for workload, timed in rounds.items()
                },
                *process.peak_bytes(),
            )
            for number, (subject, process) in enumerate(zip(subjects, processes, strict=True))
        )
    return Comparison(models, tuple(workloads), conditions, given_up, disturbance)


def _rounds(
    processes: Sequence[ModelProcess],
    workload: Workload,
    conditions: Conditions,
    patience: float,
    on_round: Callable[[], object],
) -> tuple[list[_Round], int]:
    """Run rounds, again where other programs took part of the machine, for so many seconds.

    What counts is what the others did, never the timing itself: that would choose results. Where
    they hardly let a round through, all count. Returns the rounds, and how many were given up.
    """
    every: list[_Round] = []
    kept: list[_Round] = []
    while len(kept) < conditions.rounds and patience > 0:
        start = time.monotonic()
        every.append([process.run(workload) for process in processes])
        if max(timing.disturbance for timing in every[-1]) > conditions.disturbance:
            patience -= time.monotonic() - start
        else:
            kept.append(every[-1])
            on_round()
    if len(kept) < min(_ENOUGH, conditions.rounds):
        return every, 0
    return kept, len(every) - len(kept)


def _speeds(
    processes: Sequence[ModelProcess],
    number: int,
    workload: Workload,
    rounds: Sequence[_Round],
    too_busy: bool,
) -> dict[str, Speed]:
    """Return the speed of one of the models in each phase."""
    first, own = (processes[i].footprint.work for i in (0, number))
    ideal = {
        "prefill": first.prefill_flops(workload) / own.prefill_flops(workload),
        "decode": first.decode_bytes(workload) / own.decode_bytes(workload),
    }
    tokens = {"prefill": workload.prompt, "decode": workload.new_tokens}
    found = {}
    for phase in PHASES:
        pairs = [(getattr(each[0], phase), getattr(each[number], phase)) for each in rounds]
        found[phase] = Speed(
            tuple(workload.batch * tokens[phase] / seconds for _, seconds in pairs),
            tuple(seconds_of_first / seconds for seconds_of_first, seconds in pairs),
            ideal[phase],
            too_busy,
        )
    return found

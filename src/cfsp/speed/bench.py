"""Models timed against each other, in interleaved rounds, and what comes out of them.

Machines drift. Models therefore take turns, round after round, and the figure to quote is the
median of the ratios within a round. Warm-up runs are not part of the rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from cfsp.checkpoint.config_file import read_config
from cfsp.checkpoint.locating import locate_model
from cfsp.checkpoint.text_config import longest_input_of
from cfsp.errors import UsageError
from cfsp.progress import item_progress
from cfsp.result.names import short_names
from cfsp.settings import TimingConditions, Workload, one_or_several
from cfsp.speed.subjects import Footprint, ModelProcess, Subject, Timing, model_process

# Which fraction of the processors others may take where a ratio is still said.
_TOO_BUSY = 0.2


@dataclass(frozen=True)
class Speed:
    """Throughput of one model in one phase and its ratio to the first model, round by round."""

    tokens: int  # of all sequences in one run
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]  # to the first model in the same round
    ideal_ratio: float  # what the models' sizes promise; NaN if unknown
    too_busy: bool = False  # other programs took so much meanwhile that the ratios say nothing

    @property
    def tokens_per_second(self) -> tuple[float, ...]:
        """By round."""
        return tuple(self.tokens / seconds for seconds in self.seconds)

    @property
    def median_ratio(self) -> float:
        """Median over rounds; above 1 is faster than the first model."""
        return median(self.ratios)

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "tokens_per_second": round(median(self.tokens_per_second), 3),
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
    speeds: dict[Workload, dict[str, Speed]]  # by phase
    peak_rss_bytes: int  # over everything; mapped files and libraries are in it
    peak_device_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "model": self.label,
            "fingerprint": self.footprint.fingerprint,
            "parameters": self.footprint.parameters,
            "weight_bytes": self.footprint.weight_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "load_seconds": round(self.load_seconds, 3),
            **self.facts,
            "workloads": [
                {
                    **vars(workload),
                    "seconds_to_first_token": round(median(speeds["prefill"].seconds), 5),
                    **{phase: speed.to_json() for phase, speed in speeds.items()},
                }
                for workload, speeds in self.speeds.items()
            ],
        }


@dataclass(frozen=True)
class Comparison:
    """Models on the same workloads; the first is what the others are compared to."""

    models: tuple[ModelSpeed, ...]
    conditions: TimingConditions
    # Median fraction of the processors that other programs took in the rounds.
    disturbance: dict[Workload, float]

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "conditions": vars(self.conditions),
            "disturbance": [round(value, 4) for value in self.disturbance.values()],
            "models": [model.to_json() for model in self.models],
        }


def bench(
    models: str | Path | Sequence[str | Path],
    *,
    batch: int | Sequence[int] = Workload.batch,
    prompt: int | Sequence[int] = Workload.prompt,
    new_tokens: int | Sequence[int] = Workload.new_tokens,
    rounds: int = TimingConditions.rounds,
    device: str = TimingConditions.device,
    dtype: str = TimingConditions.dtype,
) -> Comparison:
    """Time models against each other, in turns, each in a process of its own.

    The processes import the script that calls this: call it under `if __name__ == "__main__":`.
    They compute with as many threads as `OMP_NUM_THREADS` says, and the result names.

    Args:
        models: one or several, as for prune; ratios are to the first.
        batch: sequences at once; several are timed one after the other.
        prompt: prompt tokens of each; likewise.
        new_tokens: tokens generated for each; likewise.
        rounds: timed runs of each model.
        device: cpu, cuda, mps or auto.
        dtype: auto for the model's own, or float32 where the device only emulates that.

    Returns:
        Sizes, speeds with their ratios round by round, and peak memory; `to_json()` for a file.

    Raises:
        UsageError: a number is out of range.
        CheckpointError: there is no such model, or it is damaged.
    """
    models = one_or_several(models)
    if not models:
        raise UsageError("expected at least one model to time")
    axes = map(one_or_several, (batch, prompt, new_tokens))
    workloads = [Workload(*values) for values in product(*axes)]
    if not workloads:
        raise UsageError(
            "expected one batch=, prompt= and new_tokens= or several, found an empty list; leave "
            "it out for the default"
        )
    conditions = TimingConditions(rounds=rounds, device=device, dtype=dtype)
    short = short_names(list(map(str, models)), least=1)
    subjects = []
    for each in models:
        directory, label = locate_model(each), short[str(each)]
        longest = longest_input_of(read_config(directory)[0])
        asked = max(workload.prompt + workload.new_tokens for workload in workloads)
        if longest is not None and asked > longest:
            raise UsageError(
                f"{label} can read {longest} tokens at once, prompt and new tokens are "
                f"{asked}; give a smaller --prompt or --new-tokens"
            )
        subjects.append(Subject(directory, label))
    return compare_speed(subjects, workloads, conditions)


def compare_speed(
    subjects: Sequence[Subject], workloads: Sequence[Workload], conditions: TimingConditions
) -> Comparison:
    """Time models against each other, each in a process of its own; ratios are to the first."""
    timed: dict[Workload, list[list[Timing]]] = {}
    disturbance: dict[Workload, float] = {}
    with ExitStack() as stack:
        processes = [stack.enter_context(model_process(s, conditions)) for s in subjects]
        total = len(workloads) * (conditions.warmups + conditions.rounds)
        bar = stack.enter_context(item_progress("bench", total, "round"))
        for workload in workloads:
            turns = []
            for _ in range(conditions.warmups + conditions.rounds):
                turns.append([process.run(workload) for process in processes])
                bar.update()
            timed[workload] = turns[conditions.warmups :]
            disturbance[workload] = median(
                timing.disturbance for timings in timed[workload] for timing in timings
            )
        models = tuple(
            ModelSpeed(
                subject.label,
                process.footprint,
                process.facts,
                process.load_seconds,
                {
                    workload: _speeds(processes, number, workload, timed[workload], share)
                    for workload, share in disturbance.items()
                },
                *process.peak_bytes(),
            )
            for number, (subject, process) in enumerate(zip(subjects, processes, strict=True))
        )
    return Comparison(models, conditions, disturbance)


def _speeds(
    processes: Sequence[ModelProcess],
    number: int,
    workload: Workload,
    timed: Sequence[list[Timing]],
    share_of_others: float,
) -> dict[str, Speed]:
    # Other programs do not compute where an accelerator does.
    too_busy = share_of_others > _TOO_BUSY and processes[0].facts["device"] == "cpu"
    first, own = (processes[i].footprint for i in (0, number))
    read = [processes[i].footprint.decode_work(timed[0][i].cache_bytes) for i in (0, number)]
    phases = {
        "prefill": (workload.prompt, first.prefill_work(workload) / own.prefill_work(workload)),
        "decode": (workload.new_tokens, read[0] / read[1]),
    }
    found = {}
    for phase, (tokens, ideal_ratio) in phases.items():
        of_first, seconds = (tuple(getattr(each[i], phase) for each in timed) for i in (0, number))
        ratios = tuple(one / other for one, other in zip(of_first, seconds, strict=True))
        found[phase] = Speed(workload.batch * tokens, seconds, ratios, ideal_ratio, too_busy)
    return found

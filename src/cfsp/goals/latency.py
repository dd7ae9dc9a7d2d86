"""How long a model takes at several FFN widths on this machine, and between them.

Models of the same shapes with random weights and one width in all blocks are timed in turns. A
model is a sum over its blocks, so one whose blocks have different widths takes the mean of what
models of these widths take:

    t(w_1 ... w_L) = 1/L sum_l t(w_l)

Attention, head and overhead are in every t. Between measured widths t is taken to be linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cfsp.checkpoint.reading import LoadedModel
from cfsp.checkpoint.skeleton import build_skeleton
from cfsp.engine.memory import available_bytes
from cfsp.errors import UsageError
from cfsp.speed import Conditions, Workload, compare_speed
from cfsp.speed.shapes import UniformModel
from cfsp.speed.subjects import Subject
from cfsp.speed.work import work_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.planning.allocation import ModelSize
    from cfsp.settings import Phase

WORKLOAD = Workload()
ROUNDS = 5
_FRACTIONS = (0.75, 0.5, 0.25)
# What a process takes besides its weights.
_PROCESS_BYTES = 500_000_000


@dataclass(frozen=True)
class Latencies:
    """Time by FFN width, relative to the widest.

    Attributes:
        widths: ascending.
        relative: of each, 1.0 for the last.
        conditions: how it was measured, as JSON types.
    """

    widths: tuple[int, ...]
    relative: tuple[float, ...]
    conditions: dict[str, Any]

    def at(self, width: int) -> float:
        """Return the relative time of a model with one width between the least and the largest."""
        points = list(zip(self.widths, self.relative, strict=True))
        for (left, low), (right, high) in pairwise(points):
            if width <= right:
                return low + (high - low) * (width - left) / (right - left)
        return self.relative[-1]

    def speedup(self, before_L: Sequence[int], after_L: Sequence[int]) -> float:
        """Return how many times faster a model is with other widths."""
        return fmean(map(self.at, before_L)) / fmean(map(self.at, after_L))


def widths_to_measure(widest: int, multiple: int) -> list[int]:
    """Return the least width that a block may have, the widest, and some between, ascending."""
    between = {round(f * widest / multiple) * multiple for f in _FRACTIONS}
    return sorted({multiple, *(w for w in between if multiple < w < widest), widest})


def most_speedup(source: WeightSource, width: int, phase: Phase, engine: Engine) -> float:
    """Return the ratio of work between a model and the smallest one that pruning could leave.

    Work is the FLOPs of a prefill, and the bytes that a decoding step reads.

    Args:
        source: the model; only its config and shapes are read.
        width: channels that stay in every block.
        phase: what is to be faster.
        engine: in what it computes.
    """
    smallest = build_skeleton(UniformModel(source.config, width).config(), engine.dtype)
    before, after = (
        work_of(each, head=True, itemsize=engine.dtype.itemsize)
        for each in (source, LoadedModel(smallest))
    )
    if phase == "decode":
        return before.decode_bytes(WORKLOAD) / after.decode_bytes(WORKLOAD)
    return before.prefill_flops(WORKLOAD) / after.prefill_flops(WORKLOAD)


def measure_latencies(
    config: PreTrainedConfig, size: ModelSize, multiple: int, phase: Phase, engine: Engine
) -> Latencies:
    """Time models of the same shapes at several widths.

    Args:
        config: of the model.
        size: its numbers.
        multiple: of which widths are multiples.
        phase: what is timed.
        engine: where and in what.

    Raises:
        UsageError: these models do not fit into memory together.
    """
    widths = widths_to_measure(max(size.width_U), multiple)
    _check_memory(size, widths, engine)
    # The widest first: it is what the others are compared to.
    order = widths[::-1]
    subjects = [Subject(UniformModel(config, width), f"{width} wide") for width in order]
    conditions = Conditions(
        warmups=1,
        rounds=ROUNDS,
        device=str(engine.device),
        dtype=str(engine.dtype).removeprefix("torch."),
    )
    comparison = compare_speed(subjects, [WORKLOAD], conditions)
    ratios = [model.speeds[WORKLOAD][phase].median_ratio for model in comparison.models]
    return Latencies(
        tuple(widths),
        tuple(1 / ratio for ratio in reversed(ratios)),
        {
            **vars(WORKLOAD),
            **comparison.models[0].facts,
            "rounds": ROUNDS,
            "disturbance": round(comparison.disturbance[WORKLOAD], 4),
        },
    )


def _check_memory(size: ModelSize, widths: Sequence[int], engine: Engine) -> None:
    if engine.device.type != "cpu":
        return
    units = len(size.units)
    parameters = sum(size.parameters_with([width] * units) for width in widths)
    needed = parameters * engine.dtype.itemsize + len(widths) * _PROCESS_BYTES
    if needed > (available := available_bytes()):
        raise UsageError(
            f"--target-speedup times {len(widths)} models of different widths in turns, which "
            f"takes {needed / 1e9:.1f} GB; {available / 1e9:.1f} GB are available: give --sparsity "
            "and measure with cfsp bench"
        )

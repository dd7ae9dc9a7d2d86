"""How long a model takes on this machine with less of each part.

Models of the same shapes with random weights and one number in all blocks are timed in turns: of
several FFN widths, of fewer KV groups, without half of the attentions, with half of the blocks. A
model's time is a sum over its blocks, so what each saves is added up:

    t = 1 - sum over parts of mean over units (1 - t_part(what the unit keeps))

where t_part is the time of a model whose units of the part all keep that, relative to the whole
model. Head and overhead are in every t. Between measured points t is taken to be linear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from cfsp.architecture.found import Unit
from cfsp.checkpoint.reading import LoadedModel, WeightSource
from cfsp.checkpoint.skeleton import build_skeleton, empty_model
from cfsp.checkpoint.text_config import text_config_of
from cfsp.errors import UsageError
from cfsp.planning.candidate import Dropped
from cfsp.planning.make import model_size
from cfsp.settings import Budget, Part, Phase, unit_parts
from cfsp.speed import Conditions, Workload, compare_speed
from cfsp.speed.subjects import SmallerModel, Subject
from cfsp.speed.work import work_of
from cfsp.streaming.memory import available_bytes
from cfsp.streaming.runtime import Runtime

WORKLOAD = Workload()
ROUNDS = 5
_FRACTIONS = (0.75, 0.5, 0.25)
# What a process takes besides its weights.
_PROCESS_BYTES = 500_000_000
# Of the whole model's time; sums of noisy savings may exceed it.
_LEAST_TIME = 0.01


@dataclass(frozen=True)
class Curve:
    """Time by what every unit of a part keeps, relative to that of the whole model."""

    kept: tuple[int, ...]  # ascending; FFN channels, KV groups of an attention, or blocks
    relative: tuple[float, ...]  # of each, 1.0 for the last

    def at(self, kept: int) -> float:
        """Return the relative time where all units keep so many."""
        points = list(zip(self.kept, self.relative, strict=True))
        for (left, low), (right, high) in pairwise(points):
            if kept <= right:
                return low + (high - low) * (kept - left) / (right - left)
        return self.relative[-1]


@dataclass(frozen=True)
class Latencies:
    """What each part of a model takes."""

    curves: Mapping[Part, Curve]  # that of `kv` is of attentions too, which keep 0
    conditions: dict[str, Any]  # how it was measured, as JSON types

    def speedup(
        self, units: Sequence[Unit], kept_U: Sequence[int], dropped: Dropped, blocks: int
    ) -> float:
        """Return how many times faster a model of so many blocks is that keeps this of units."""
        before = {
            part: [unit.width for unit in units if unit.part == part] for part in ("ffn", "kv")
        }
        after = {
            part: [
                # What a block saves is measured whole.
                unit.width if unit.block in dropped.blocks else kept
                for unit, kept in zip(units, kept_U, strict=True)
                if unit.part == part
            ]
            for part in before
        }
        return self._time({**before, "blocks": [blocks]}) / self._time(
            {**after, "blocks": [blocks - len(dropped.blocks)]}
        )

    def _time(self, kept: Mapping[str, Sequence[int]]) -> float:
        saved = (1 - fmean(map(curve.at, kept[part])) for part, curve in self.curves.items())
        return max(_LEAST_TIME, 1 - sum(saved))

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> Latencies:
        """Return what `to_json` made."""
        curves = {
            part: Curve(tuple(curve["kept"]), tuple(curve["relative"]))
            for part, curve in fields["curves"].items()
        }
        return Latencies(curves, fields["conditions"])


def measured_parts(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Return the parts whose time is measured: attentions are KV groups, down to none."""
    units = unit_parts(parts)
    return (*units, "blocks") if "blocks" in parts else units


def widths_to_measure(widest: int, multiple: int) -> list[int]:
    """Return the least width that a block may have, the widest, and some between, ascending."""
    between = {round(f * widest / multiple) * multiple for f in _FRACTIONS}
    return sorted({multiple, *(w for w in between if multiple < w < widest), widest})


@dataclass(frozen=True)
class Timed:
    """A smaller model to time."""

    part: Part  # of which it has less than the whole one
    kept: int  # by a share of the part's units
    share: float
    model: SmallerModel


def models_to_time(
    source: WeightSource, budget: Budget, multiple: int
) -> tuple[SmallerModel, list[Timed]]:
    """Return the whole model, and those with less of each part that a budget may take."""
    parts, units = measured_parts(budget.parts), source.units
    widest = max((unit.width for unit in units if unit.part == "ffn"), default=0)
    widths = [widest if unit.part == "ffn" and "ffn" in parts else unit.width for unit in units]

    def with_at_most(part: Part, kept: int, blocks: Iterable[int] | None = None) -> SmallerModel:
        fewer = tuple(
            min(width, kept)
            if unit.part == part and (blocks is None or unit.block in blocks)
            else width
            for unit, width in zip(units, widths, strict=True)
        )
        return SmallerModel(source.config, budget.parts, fewer)

    timed = []
    if "ffn" in parts:
        timed += [
            Timed("ffn", width, 1.0, with_at_most("ffn", width))
            for width in reversed(widths_to_measure(widest, multiple)[:-1])
        ]
    attentions = [unit for unit in units if unit.part == "kv"]
    if "kv" in budget.parts and max(unit.width for unit in attentions) > 1:
        timed.append(Timed("kv", 1, 1.0, with_at_most("kv", 1)))
    if "attention" in budget.parts and (without := _every_other(source, attentions)):
        share = len(without) / len(attentions)
        timed.append(Timed("kv", 0, share, with_at_most("kv", 0, without)))
    count = source.architecture.block_count
    if "blocks" in parts and count > 1:
        gone = range((count + 1) // 2, count)
        stay = tuple(w for unit, w in zip(units, widths, strict=True) if unit.block not in gone)
        model = SmallerModel(source.config, budget.parts, stay, tuple(gone))
        timed.append(Timed("blocks", 0, len(gone) / count, model))
    return SmallerModel(source.config, budget.parts, tuple(widths)), timed


def _every_other(source: WeightSource, attentions: Sequence[Unit]) -> list[int]:
    """Return the blocks of every other attention of each kind: the first of each stays."""
    kinds = getattr(text_config_of(source.config), "layer_types", None)
    alike: dict[object, list[int]] = {}
    for unit in attentions:
        alike.setdefault(kinds[unit.block] if kinds else None, []).append(unit.block)
    return sorted(block for blocks in alike.values() for block in blocks[1::2])


def least_widths(source: WeightSource, budget: Budget, parts: Sequence[Part]) -> tuple[int, ...]:
    """Return what units keep where as much goes of these parts as may; all blocks stay."""
    measured, kv = measured_parts(parts), 0 if "attention" in parts else 1
    multiples = zip(source.units, model_size(source).multiple_U(budget), strict=True)
    return tuple(
        min(unit.width, multiple if unit.part == "ffn" else kv)
        if unit.part in measured
        else unit.width
        for unit, multiple in multiples
    )


def most_speedup(
    source: WeightSource, budget: Budget, parts: Sequence[Part], phase: Phase, runtime: Runtime
) -> float:
    """Return the ratio of work between a model and the smallest one that pruning could leave.

    Work is the FLOPs of a prefill, and the bytes that a decoding step reads. Where blocks may go
    (`parts`), one stays. Only config and shapes are read.
    """
    least = least_widths(source, budget, parts)
    config = SmallerModel(source.config, budget.parts, least).config()
    smallest = LoadedModel(build_skeleton(config, runtime.dtype))

    def amount(each: WeightSource, *, blocks: float = 1.0) -> float:
        work = work_of(each, runtime.dtype.itemsize)
        if phase == "decode":
            whole, head = work.decode_bytes(WORKLOAD), work.head_bytes
        else:
            whole = work.prefill_flops(WORKLOAD)
            head = 2.0 * WORKLOAD.batch * work.head_parameters
        return head + blocks * (whole - head)

    blocks = 1 / source.architecture.block_count if "blocks" in parts else 1.0
    return amount(source) / amount(smallest, blocks=blocks)


def measure_latencies(
    source: WeightSource, budget: Budget, multiple: int, phase: Phase, runtime: Runtime
) -> Latencies:
    """Time models of the same shapes with less of each part; only config and shapes are read."""
    whole, timed = models_to_time(source, budget, multiple)
    # The whole one first: it is what the others are compared to.
    subjects = [
        Subject(whole, "the whole model"),
        *(Subject(each.model, f"{each.part} {each.kept} of {each.share:.0%}") for each in timed),
    ]
    _check_memory([whole, *(each.model for each in timed)], runtime)
    conditions = Conditions(
        warmups=1,
        rounds=ROUNDS,
        device=str(runtime.device),
        dtype=str(runtime.dtype).removeprefix("torch."),
    )
    comparison = compare_speed(subjects, [WORKLOAD], conditions)
    ratios = [model.speeds[WORKLOAD][phase].median_ratio for model in comparison.models[1:]]
    points: dict[Part, dict[int, float]] = {}
    for each, ratio in zip(timed, ratios, strict=True):
        # As if all units of the part had lost what a share of them did.
        points.setdefault(each.part, {})[each.kept] = 1 - (1 - 1 / ratio) / each.share
    most = {"blocks": source.architecture.block_count}
    for unit, width in zip(source.units, whole.widths, strict=True):
        most[unit.part] = max(width, most.get(unit.part, 0))
    curves = {
        part: Curve(*zip(*sorted({**found, most[part]: 1.0}.items()), strict=True))
        for part, found in points.items()
    }
    return Latencies(
        curves,
        {
            **vars(WORKLOAD),
            **comparison.models[0].facts,
            "rounds": ROUNDS,
            "disturbance": round(comparison.disturbance[WORKLOAD], 4),
        },
    )


def _check_memory(models: Sequence[SmallerModel], runtime: Runtime) -> None:
    if runtime.device.type != "cpu":
        return
    parameters = sum(
        parameter.numel()
        for each in models
        for parameter in empty_model(each.config()).parameters()
    )
    needed = parameters * runtime.dtype.itemsize + len(models) * _PROCESS_BYTES
    if needed > (available := available_bytes()):
        raise UsageError(
            f"--target-speedup times {len(models)} models of different sizes in turns, which "
            f"takes {needed / 1e9:.1f} GB; {available / 1e9:.1f} GB are available: give --sparsity "
            "and measure with cfsp bench"
        )

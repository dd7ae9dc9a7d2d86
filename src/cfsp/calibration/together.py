"""Calibration by several processes: each takes a part of the windows, sums are added at the end.

Windows are split between batches, never within one, so that every batch is computed as one
process would compute it. The sums then add up to the same numbers (see `accumulators`).

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from cfsp.calibration.accumulators import BlockSums
from cfsp.calibration.calibrate import calibrate, calibration_record, check_seen
from cfsp.calibration.statistics import (
    BlockStatistics,
    CalibrationRecord,
    ObservedBlock,
    RunDistances,
    Statistics,
    UnitStatistics,
)
from cfsp.checkpoint.reading import fingerprint
from cfsp.errors import UsageError
from cfsp.processes import Team
from cfsp.streaming.block_stream import windows_in_batch
from cfsp.streaming.versions import versions
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.streaming.runtime import Runtime
    from cfsp.streaming.work_dir import WorkDir

Part = TypeVar("Part", BlockStatistics, UnitStatistics)

# What is summed over tokens.
_SUMS = ("distance_sums", "tokens")
_SUMS_OF_UNIT = ("sum_of_squares_F", "tokens", "routed_E", "distance_sums", "output_norm_E")


def calibrate_together(
    source: WeightSource,
    windows: Windows,
    runtime: Runtime,
    *,
    seed: int,
    place: WorkDir,
    name: str = "calibrate",
    runs: bool,
) -> Statistics:
    """Return the statistics of all windows, of which each process of a team calibrates a part.

    Where there are fewer batches than processes, some have nothing to do.

    Args:
        source: the model.
        windows: all of them, the same in every process.
        runtime: where and in what blocks compute.
        seed: the seed that the windows were drawn by, for the record.
        place: where to spill and to save, and the team.
        name: of the pass.
        runs: whether to compare runs of consecutive blocks as well.

    Raises:
        CfspError: as `calibrate` does.
        ProcessError: a process died, or is not there in time.
    """
    team = place.team
    if team.size == 1:
        return calibrate(source, windows, runtime, seed=seed, place=place, name=name, runs=runs)
    record = calibration_record(source, windows, runtime, seed=seed)
    own = windows.part(part_of(windows, team, runtime.batch_windows))
    if len(own.tokens_NT):
        part = calibrate(
            source, own, runtime, seed=seed, place=place, name=name, is_part=True, runs=runs
        )
    else:
        part = _nothing_seen(source, record, runs)
    total = add_up(part, team, runtime.device)
    check_seen(source.units, total.units)
    return replace(total, record=record)


def part_of(windows: Windows, team: Team, batch_windows: int | None) -> slice:
    """Return which windows one process has: whole batches, or none."""
    size = windows_in_batch(windows, batch_windows)
    own = team.share(math.ceil(len(windows.tokens_NT) / size))
    return slice(own.start * size, own.stop * size)


def check_enough(windows: Windows, team: Team, batch_windows: int | None) -> None:
    """Check that every process has windows.

    Raises:
        UsageError: there are fewer batches than processes.
    """
    size, count = windows_in_batch(windows, batch_windows), len(windows.tokens_NT)
    batches = math.ceil(count / size)
    if batches < team.size:
        raise UsageError(
            f"{count} windows in batches of {size} are {batches} batches, too few for "
            f"{team.size} processes; take more --samples, fewer processes, or "
            f"--batch-windows {max(1, count // team.size)}"
        )


def check_same_work(team: Team, sources: Sequence[WeightSource], more: Mapping[str, str]) -> None:
    """Check that all processes have the same models, work and software.

    Args:
        team: the processes.
        sources: the models.
        more: what else must be the same, by name.

    Raises:
        UsageError: one has another.
    """
    if team.size > 1:
        software = {f"version of {name}": found for name, found in versions().items()}
        models = ", ".join(map(fingerprint, sources))
        team.check_same({"model": models, **more, **software})


def _nothing_seen(source: WeightSource, record: CalibrationRecord, runs: bool) -> Statistics:
    """Return statistics of no windows."""
    of_block = source.architecture.units_of
    blocks = range(source.architecture.block_count)
    observed = [BlockSums(of_block(block)).observed(block) for block in blocks]
    statistics = Statistics.of(observed, record)
    if not runs:
        return statistics
    boundaries = source.architecture.block_count + 1
    return replace(statistics, runs=RunDistances(((0.0,) * boundaries,) * boundaries, 0))


def add_up(part: Statistics, team: Team, device: torch.device) -> Statistics:
    """Return the sum of the statistics of all processes, in one exchange.

    Args:
        part: of this process.
        team: the processes.
        device: where the sums are added up.
    """
    blocks, units = _added_up(part.blocks, part.units, team, device)
    return replace(part, blocks=blocks, units=units, runs=_added_up_runs(part.runs, team, device))


def _added_up_runs(
    runs: RunDistances | None, team: Team, device: torch.device
) -> RunDistances | None:
    if runs is None:
        return None
    own = torch.tensor([*(value for row in runs.sums for value in row), runs.tokens])
    *sums, tokens = team.add_up(own.double().to(device)).cpu().tolist()
    size = len(runs.sums)
    rows = tuple(tuple(sums[row * size : (row + 1) * size]) for row in range(size))
    return RunDistances(rows, int(tokens))


def add_up_block(part: ObservedBlock, team: Team, device: torch.device) -> ObservedBlock:
    """Return the sum of the statistics of one block; see `add_up`."""
    if team.size == 1:
        return part
    (block,), units = _added_up((part.block,), part.units, team, device)
    return ObservedBlock(block, units)


def _added_up(
    blocks: Sequence[BlockStatistics],
    units: Sequence[UnitStatistics],
    team: Team,
    device: torch.device,
) -> tuple[tuple[BlockStatistics, ...], tuple[UnitStatistics, ...]]:
    values = [getattr(block, name) for block in blocks for name in _SUMS]
    values += [getattr(unit, name) for unit in units for name in _SUMS_OF_UNIT]
    own = torch.cat([_numbers(value) for value in values])
    total = team.add_up(own.to(device)).cpu()
    sums = iter(torch.split(total, [_numbers(value).numel() for value in values]))
    return (
        tuple(_with_numbers(block, _SUMS, sums) for block in blocks),
        tuple(_with_numbers(unit, _SUMS_OF_UNIT, sums) for unit in units),
    )


def _with_numbers(part: Part, names: Sequence[str], sums: Iterator[Tensor]) -> Part:
    """Return a part of the statistics whose sums are the next ones."""
    return replace(part, **{name: _like(getattr(part, name), next(sums)) for name in names})


def _numbers(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.double().reshape(-1)
    if isinstance(value, dict):
        return torch.tensor(list(value.values()), dtype=torch.float64)
    if isinstance(value, tuple):
        return torch.tensor(value, dtype=torch.float64)
    return torch.tensor([value], dtype=torch.float64)


def _like(value: Any, numbers: Tensor) -> Any:
    if isinstance(value, Tensor):
        return numbers.reshape(value.shape).to(value.dtype).clone()
    if isinstance(value, dict):
        return dict(zip(value, numbers.tolist(), strict=True))
    if isinstance(value, tuple):
        return tuple(int(number) for number in numbers.tolist())
    return type(value)(numbers.item())

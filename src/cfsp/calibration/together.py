"""Calibration by several processes: each takes a part of the windows, sums are added at the end.

Windows are split between batches, never within one, so that every batch is computed as one
process would compute it. The sums then add up to the same numbers (see `accumulators`).

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cfsp.calibration.statistics import (
    BlockStatistics,
    CalibrationRecord,
    Statistics,
    UnitStatistics,
)
from cfsp.engine.block_stream import windows_in_batch
from cfsp.errors import UsageError
from cfsp.processes import Team
from cfsp.text.windows import Windows

Part = TypeVar("Part", BlockStatistics, UnitStatistics)

# What is summed over tokens.
_SUMS = ("distance_sums", "tokens")
_SUMS_OF_UNIT = ("sum_F", "sum_of_squares_F", "tokens", "routed_E")


def calibrate_together(
    windows: Windows,
    calibrate_part: Callable[[Windows], Statistics],
    record: CalibrationRecord,
    team: Team,
    *,
    batch_windows: int | None,
    device: torch.device,
) -> Statistics:
    """Return the statistics of all windows, of which each process calibrates a part.

    Args:
        windows: all of them, the same in every process.
        calibrate_part: gives the statistics of some windows.
        record: of the calibration as a whole.
        team: the processes.
        batch_windows: windows that pass a block together; None for about 4096 tokens.
        device: where the sums are added up.

    Raises:
        UsageError: there are fewer batches than processes.
        ProcessError: a process died, or is not there in time.
    """
    part = calibrate_part(windows_of(windows, team, batch_windows))
    return replace(add_up(part, team, device), record=record)


def windows_of(windows: Windows, team: Team, batch_windows: int | None) -> Windows:
    """Return the windows of one process, whole batches.

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
    first = team.rank * batches // team.size
    last = (team.rank + 1) * batches // team.size
    return windows.part(slice(first * size, last * size))


def add_up(part: Statistics, team: Team, device: torch.device) -> Statistics:
    """Return the sum of the statistics of all processes, in one exchange.

    Args:
        part: of this process.
        team: the processes.
        device: where the sums are added up.
    """
    values = [getattr(block, name) for block in part.blocks for name in _SUMS]
    values += [getattr(unit, name) for unit in part.units for name in _SUMS_OF_UNIT]
    own = torch.cat([_numbers(value) for value in values])
    total = team.add_up(own.to(device)).cpu()
    sums = iter(torch.split(total, [_numbers(value).numel() for value in values]))
    blocks = tuple(_with_numbers(block, _SUMS, sums) for block in part.blocks)
    units = tuple(_with_numbers(unit, _SUMS_OF_UNIT, sums) for unit in part.units)
    return replace(part, blocks=blocks, units=units)


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

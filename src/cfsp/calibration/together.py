"""Several processes that calibrate: each takes a part of the windows, sums are added at the end.

Windows are split between batches, never within one, so that every batch is computed as one
process would compute it. The sums then add up to the same numbers; `cfsp.calibration.calibrate`
says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cfsp.calibration.observed import BlockStatistics, ObservedBlock, UnitStatistics
from cfsp.checkpoint.reading import WeightSource, fingerprint
from cfsp.errors import UsageError
from cfsp.processes import Team
from cfsp.streaming.block_stream import windows_in_batch
from cfsp.streaming.runtime import versions
from cfsp.text.windows import Windows

# What is summed over tokens.
_SUMS: dict[type, tuple[str, ...]] = {
    BlockStatistics: ("distance_sum", "tokens"),
    UnitStatistics: ("sum_of_squares_F", "tokens", "routed_E", "distance_sum", "output_norm_E"),
}


def part_of(windows: Windows, team: Team, batch_windows: int | None) -> slice:
    """Return which windows one process has: whole batches, or none."""
    return team.share(len(windows.tokens_NT), windows_in_batch(windows, batch_windows))


def check_enough(windows: Windows, team: Team, batch_windows: int | None) -> None:
    """Check that every process has windows."""
    size, count = windows_in_batch(windows, batch_windows), len(windows.tokens_NT)
    batches = math.ceil(count / size)
    if batches < team.size:
        raise UsageError(
            f"{count} windows in batches of {size} are {batches} batches, too few for "
            f"{team.size} processes; take more --samples, fewer processes, or "
            f"--batch-windows {max(1, count // team.size)}"
        )


def check_same_work(team: Team, sources: Sequence[WeightSource], more: Mapping[str, str]) -> None:
    """Check that all processes have the same models and software, and what else is named."""
    if team.size > 1:
        software = {f"version of {name}": found for name, found in versions().items()}
        models = ", ".join(map(fingerprint, sources))
        team.check_same({"model": models, **more, **software})


def add_up(
    observed: Sequence[ObservedBlock], team: Team, device: torch.device
) -> list[ObservedBlock]:
    """Return the sums over all processes of the statistics of blocks, in one exchange.

    They are added up on a device.
    """
    if team.size == 1:
        return list(observed)
    parts = [part for each in observed for part in (each.block, *each.units)]
    values = [getattr(part, name) for part in parts for name in _SUMS[type(part)]]
    numbers = list(map(_numbers, values))
    total = added_up(torch.cat(numbers), team, device)
    sums = iter(torch.split(total, [each.numel() for each in numbers]))
    found = iter([_with(part, sums) for part in parts])
    return [
        replace(each, block=next(found), units=tuple(next(found) for _ in each.units))
        for each in observed
    ]


def added_up(numbers: Tensor, team: Team, device: torch.device) -> Tensor:
    """Return the sum of numbers over all processes, on the CPU."""
    return numbers if team.size == 1 else team.add_up(numbers.to(device)).cpu()


def _with(part: Any, sums: Iterator[Tensor]) -> Any:
    """Return a part of the statistics whose sums are the next ones."""
    names = _SUMS[type(part)]
    return replace(part, **{name: _like(getattr(part, name), next(sums)) for name in names})


def _numbers(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.double().reshape(-1)
    return torch.tensor(() if value is None else value, dtype=torch.float64).reshape(-1)


def _like(value: Any, numbers: Tensor) -> Any:
    if isinstance(value, Tensor):
        return numbers.reshape(value.shape).to(value.dtype).clone()
    if isinstance(value, tuple):
        return tuple(int(number) for number in numbers.tolist())
    return None if value is None else type(value)(numbers.item())

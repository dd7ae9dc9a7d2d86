"""The restoring pass: statistics, choice of channels and repair, block by block, in one pass.

Repair needs each block's Gram matrix (0.8 GB at 14336 channels), so no two are ever held:
a block's channels are chosen as soon as its windows have passed, its down projection is
repaired and written to the work directory, and the Gram matrix is dropped. Widths must
therefore be known beforehand: from a plan, or from a coarse pass over a few windows.

Shapes: N windows, B windows in a batch, T tokens, F FFN channels, R rows (tokens).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.accumulators import ChannelSums, DistanceSums
from cfsp.calibration.block_pass import pass_blocks
from cfsp.calibration.block_stream import StreamedBlock
from cfsp.calibration.calibrate import (
    StatisticsFiles,
    calibration_record,
    check_vocabulary_size,
    statistics_of,
)
from cfsp.calibration.statistics import BlockStatistics
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.tensor_file import (
    OutgoingTensor,
    TensorFile,
    TensorSpec,
    tensor_chunks,
    write_tensor_file,
)
from cfsp.errors import TextError
from cfsp.restoration.gram import GramSums
from cfsp.restoration.ridge import restore_down_projection
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.workplace import Workplace

PASS_NAME = "calibrate and restore"

HELD_OUT_WINDOWS = 4
_LEAST_STRIDE = 8

ChooseChannels = Callable[[int, BlockStatistics], Sequence[int]]


@dataclass(frozen=True)
class RestoredBlock:
    """What the restoring pass did with one block.

    Attributes:
        statistics: of all windows, as calibration gathers them.
        kept: channels that stay, ascending.
        ridge: chosen strength; None if the block was better left as it was.
        error_before: relative squared error of the FFN's output on held-out windows.
        error_after: the same after repair; never larger.
        file: holds the repaired down projection under its name in the model.
    """

    statistics: BlockStatistics
    kept: tuple[int, ...]
    ridge: float | None
    error_before: float
    error_after: float
    file: TensorFile


def restore_blocks(
    source: WeightSource,
    tokens_NT: Tensor,
    choose: ChooseChannels,
    place: Workplace,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch_windows: int | None = None,
) -> list[RestoredBlock]:
    """Pass all windows through the model once; choose and repair in every block.

    Args:
        source: the model.
        tokens_NT: windows; every eighth (at most four in all) is held out from the fit.
        choose: gives the channels that a block keeps, from its index and statistics.
        place: where repaired tensors go, until they are in the new checkpoint.
        device: where to compute.
        dtype: what blocks compute in; sums are float32, the solve is float64.
        batch_windows: windows that pass together.

    Raises:
        TextError: fewer than two windows: none can be held out.
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the workplace holds unfinished work of something else.
    """
    if len(tokens_NT) < 2:
        raise TextError(
            "restoration needs at least 2 windows, one of them held out, found 1; "
            "give more --samples, or --restore none"
        )
    check_vocabulary_size(source.config.vocab_size, tokens_NT, source.label)
    directory = place.directory_of(PASS_NAME)
    record = calibration_record(source, Windows(tokens_NT, {}), device=device, dtype=dtype, seed=0)
    return pass_blocks(
        source,
        tokens_NT,
        lambda block: _restore(block, source, len(tokens_NT), choose, directory),
        _RestoredFiles(StatisticsFiles(record)),
        name=PASS_NAME,
        device=device,
        dtype=dtype,
        batch_windows=batch_windows,
        place=place,
    )


@dataclass(frozen=True)
class _RestoredFiles:
    """Keeps what the pass did with one block beside the repaired tensor, which is there already."""

    statistics: StatisticsFiles

    def save(self, result: RestoredBlock, directory: Path, block: int) -> None:
        self.statistics.save(result.statistics, directory, block)
        facts = {
            "kept": list(result.kept),
            "ridge": result.ridge,
            "error_before": result.error_before,
            "error_after": result.error_after,
        }
        write_atomically(directory / f"restored-{block:05d}.json", json.dumps(facts).encode())

    def load(self, directory: Path, block: int) -> RestoredBlock:
        facts = json.loads((directory / f"restored-{block:05d}.json").read_text(encoding="utf-8"))
        return RestoredBlock(
            statistics=self.statistics.load(directory, block),
            kept=tuple(facts["kept"]),
            ridge=facts["ridge"],
            error_before=facts["error_before"],
            error_after=facts["error_after"],
            file=TensorFile(_tensor_path(directory, block)),
        )


def _tensor_path(directory: Path, block: int) -> Path:
    return directory / f"restored-{block:05d}.safetensors"


def _restore(
    block: StreamedBlock,
    source: WeightSource,
    windows: int,
    choose: ChooseChannels,
    directory: Path,
) -> RestoredBlock:
    distances, observed = DistanceSums(), _Observation(windows)
    block.advance(observed.add, distances.add)
    statistics = statistics_of(block.index, distances, observed.channels)
    kept = tuple(choose(block.index, statistics))
    name = source.family.weight_name(block.index, source.family.down)
    down_DF = source.family.turned(source.read(name))
    solution = restore_down_projection(
        down_DF.to(observed.device), kept, observed.gram.mean(), observed.held_out_RF()
    )
    path = _tensor_path(directory, block.index)
    down_DK = source.family.turned(solution.down_DK).contiguous()
    outgoing = OutgoingTensor(
        name, TensorSpec(down_DK.dtype, tuple(down_DK.shape)), lambda: tensor_chunks(down_DK)
    )
    write_tensor_file(path, [outgoing])
    return RestoredBlock(
        statistics,
        kept,
        solution.ridge,
        solution.error_before,
        solution.error_after,
        TensorFile(path),
    )


class _Observation:
    """Channel sums of all windows, Gram matrix of most, activations of the held-out few."""

    def __init__(self, windows: int) -> None:
        self.channels = ChannelSums()
        self.gram = GramSums()
        self.device = torch.device("cpu")
        # Spread over the windows, so that every text of a mixture is held out in part.
        stride = max(_LEAST_STRIDE, math.ceil(windows / HELD_OUT_WINDOWS))
        stride = min(stride, windows)
        self._is_held_out = [index % stride == stride - 1 for index in range(windows)]
        self._seen = 0
        self._held_out: list[Tensor] = []

    def add(self, act_BTF: Tensor) -> None:
        self.device = act_BTF.device
        self.channels.add(act_BTF)
        count = act_BTF.shape[0]
        held_out_B = torch.tensor(self._is_held_out[self._seen : self._seen + count])
        held_out_B = held_out_B.to(act_BTF.device)
        self._seen += count
        if bool(held_out_B.any()):
            self._held_out.append(act_BTF[held_out_B].flatten(0, 1))
            act_BTF = act_BTF[~held_out_B]
        if act_BTF.shape[0]:
            self.gram.add(act_BTF.flatten(0, 1))

    def held_out_RF(self) -> Tensor:
        return torch.cat(self._held_out)

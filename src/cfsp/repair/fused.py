"""The restoring pass: statistics, choice of channels and repair, block by block, in one pass.

Repair needs each block's Gram matrix (0.8 GB at 14336 channels), so no two are ever held:
a block's channels are chosen as soon as its windows have passed, its down projection is
repaired and written to the work directory, and the Gram matrix is dropped. Widths must
therefore be known beforehand: from a plan, or from a coarse pass over a few windows.

Shapes: N windows, B windows in a batch, T tokens, F FFN channels, R rows (tokens).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.accumulators import DistanceSums
from cfsp.calibration.calibrate import (
    StatisticsFiles,
    calibration_record,
    check_tokens,
    statistics_of,
)
from cfsp.calibration.statistics import BlockStatistics
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.tensor_file import TensorFile, outgoing_tensor, write_tensor_file
from cfsp.engine.block_pass import pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.errors import TextError
from cfsp.repair.observation import Observation
from cfsp.repair.ridge import leave_as_it_is, restore_down_projection
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.workplace import Workplace

PASS_NAME = "calibrate and restore"

# An expert that saw fewer tokens outside the held-out windows, or in them, is not repaired.
LEAST_TOKENS = 32
LEAST_HELD_OUT = 8

ChooseChannels = Callable[[int, BlockStatistics], Sequence[int]]


@dataclass(frozen=True)
class Repair:
    """How the repair of one FFN went.

    Attributes:
        ridge: chosen strength; None if the FFN was better left as it was.
        error_before: relative squared error of the FFN's output on held-out windows.
        error_after: the same after repair; never larger.
        energy: sum of squares of that output, which the errors are relative to.
        few_tokens: whether it was left as it was because it saw too few tokens to be repaired.
    """

    ridge: float | None
    error_before: float
    error_after: float
    energy: float
    few_tokens: bool = False


@dataclass(frozen=True)
class RestoredBlock:
    """What the restoring pass did with one block.

    Attributes:
        statistics: of all windows, as calibration gathers them.
        kept: channels that stay, ascending.
        repairs: how it went with each FFN.
        file: holds the repaired down projections under their names in the model.
    """

    statistics: BlockStatistics
    kept: tuple[int, ...]
    repairs: tuple[Repair, ...]
    file: TensorFile

    @property
    def ridge(self) -> float | None:
        """Chosen strength, of experts the median of them; None if nothing was repaired."""
        chosen = [repair.ridge for repair in self.repairs if repair.ridge is not None]
        return median_low(chosen) if chosen else None

    @property
    def error_before(self) -> float:
        """Relative squared error of the output of all FFNs before repair."""
        return self._mean([repair.error_before for repair in self.repairs])

    @property
    def error_after(self) -> float:
        """The same after repair; never larger."""
        return self._mean([repair.error_after for repair in self.repairs])

    def _mean(self, errors: Sequence[float]) -> float:
        if len(errors) == 1:
            return errors[0]
        energies = [repair.energy for repair in self.repairs]
        pairs = zip(errors, energies, strict=True)
        return sum(error * energy for error, energy in pairs) / (sum(energies) or 1.0)


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
    check_tokens(source.config, tokens_NT, source.label)
    directory = place.directory_of(PASS_NAME)
    record = calibration_record(source, Windows(tokens_NT, {}), device=device, dtype=dtype, seed=0)
    restored = pass_blocks(
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
    warn_of_unrepaired(restored)
    return restored


@dataclass(frozen=True)
class _RestoredFiles:
    """Keeps what the pass did with one block beside the repaired tensor, which is there already."""

    statistics: StatisticsFiles

    def save(self, result: RestoredBlock, directory: Path, block: int) -> None:
        self.statistics.save(result.statistics, directory, block)
        facts = {
            "kept": list(result.kept),
            "repairs": [asdict(repair) for repair in result.repairs],
        }
        write_atomically(directory / f"restored-{block:05d}.json", json.dumps(facts).encode())

    def load(self, directory: Path, block: int) -> RestoredBlock:
        facts = json.loads((directory / f"restored-{block:05d}.json").read_text(encoding="utf-8"))
        return RestoredBlock(
            statistics=self.statistics.load(directory, block),
            kept=tuple(facts["kept"]),
            repairs=tuple(Repair(**repair) for repair in facts["repairs"]),
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
    distances, observed = DistanceSums(), Observation(windows, block.ffns)
    block.advance(observed.add, distances.add)
    statistics = statistics_of(block.index, distances, observed.channels)
    kept = tuple(choose(block.index, statistics))
    family, kept_width = source.family, len(kept) // block.ffns
    repairs, outgoing = [], []
    for ffn in range(block.ffns):
        name = family.weight_name(block.index, family.down, ffn)
        down_DF = family.turned(source.read(name)).to(observed.device)
        own_K = kept[ffn * kept_width : (ffn + 1) * kept_width]
        own = [channel - ffn * statistics.width for channel in own_K]
        # A dense block has as many tokens as the user gave it; of experts some see very few.
        few = block.ffns > 1 and (
            observed.gram_E[ffn].tokens < LEAST_TOKENS
            or observed.held_out_rows(ffn) < LEAST_HELD_OUT
        )
        held_out_RF = observed.held_out_RF(ffn)
        if few:
            solution = leave_as_it_is(down_DF, own, held_out_RF)
        else:
            gram_FF = observed.gram_E[ffn].mean()
            solution = restore_down_projection(down_DF, own, gram_FF, held_out_RF)
        errors = solution.error_before, solution.error_after
        repairs.append(Repair(solution.ridge, *errors, solution.energy, few))
        outgoing.append(outgoing_tensor(name, family.turned(solution.down_DK).contiguous()))
    path = _tensor_path(directory, block.index)
    write_tensor_file(path, outgoing)
    return RestoredBlock(statistics, kept, tuple(repairs), TensorFile(path))


def warn_of_unrepaired(restored: Sequence[RestoredBlock]) -> None:
    """Tell people which experts saw too few tokens to be repaired."""
    few = [
        f"block {index} experts {', '.join(experts)}"
        for index, block in enumerate(restored)
        if (experts := [str(i) for i, repair in enumerate(block.repairs) if repair.few_tokens])
    ]
    if few:
        print(
            f"not repaired, because they saw fewer than {LEAST_TOKENS} tokens in the fit or "
            f"{LEAST_HELD_OUT} in the held-out windows: {'; '.join(few)}",
            file=sys.stderr,
        )

"""The pass of ridge repair: statistics, choice of channels and repair, block by block, in one pass.

Repair needs each block's Gram matrix (0.8 GB at 14336 channels), so no two are ever held:
a block's channels are chosen as soon as its windows have passed, its down projection is
repaired and written to the work directory, and the Gram matrix is dropped. Widths must
therefore be known beforehand: from a plan, or from a coarse pass over a few windows.

Shapes: F FFN channels.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING

from cfsp.calibration.accumulators import DistanceSums
from cfsp.calibration.calibrate import (
    StatisticsFiles,
    calibration_record,
    check_tokens,
    statistics_of,
)
from cfsp.calibration.statistics import BlockStatistics
from cfsp.checkpoint.output import write_atomically
from cfsp.engine.block_pass import pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.repair.observation import Observation
from cfsp.repair.repaired import (
    BlockRepair,
    ExpertRepair,
    RepairedBlock,
    RepairFiles,
    write_tensors,
)
from cfsp.repair.ridge import RidgeSolution, leave_as_it_is, repair_down_projection

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.text.windows import Windows

NAME = "ridge"

# An expert that saw fewer tokens outside the held-out windows, or in them, is not repaired.
LEAST_TOKENS = 32
LEAST_HELD_OUT = 8

ChooseChannels = Callable[[int, BlockStatistics], Sequence[int]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenBlock:
    """What the pass did with one block.

    Attributes:
        statistics: of all windows, as calibration gathers them.
        kept: channels that stay, ascending.
        repaired: what repair did.
    """

    statistics: BlockStatistics
    kept: tuple[int, ...]
    repaired: RepairedBlock


def choose_and_repair(
    source: WeightSource,
    windows: Windows,
    choose: ChooseChannels,
    engine: Engine,
    place: Workplace,
    *,
    seed: int = 0,
) -> list[ChosenBlock]:
    """Pass all windows through the model once; choose and repair in every block.

    Args:
        source: the model.
        windows: two or more; some are held out from the fit (see `cfsp.text.hold_out`).
        choose: gives the channels that a block keeps, from its index and statistics.
        engine: where and in what to compute; sums are float32, the solve is float64.
        place: where new tensors go, until they are in the new checkpoint.
        seed: that the windows were drawn by, for the record.

    Raises:
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the workplace holds unfinished work of something else.
    """
    check_tokens(source.config, windows.tokens_NT, source.label)
    record = calibration_record(source, windows, engine, seed=seed)
    chosen = pass_blocks(
        source,
        windows.tokens_NT,
        partial(_visit, source, windows, choose, place.directory_of(NAME)),
        _ChosenFiles(StatisticsFiles(record), RepairFiles()),
        name=NAME,
        device=engine.device,
        dtype=engine.dtype,
        batch_windows=engine.batch_windows,
        place=place,
    )
    _warn_of_unrepaired(chosen)
    return chosen


@dataclass(frozen=True)
class _ChosenFiles:
    """Keeps what the pass did with one block beside the repaired tensor, which is there already."""

    statistics: StatisticsFiles
    repairs: RepairFiles

    def save(self, result: ChosenBlock, directory: Path, block: int) -> None:
        self.statistics.save(result.statistics, directory, block)
        self.repairs.save(result.repaired, directory, block)
        write_atomically(_kept_path(directory, block), json.dumps(list(result.kept)).encode())

    def load(self, directory: Path, block: int) -> ChosenBlock:
        repaired = self.repairs.load(directory, block)
        assert repaired is not None
        kept = json.loads(_kept_path(directory, block).read_text(encoding="utf-8"))
        return ChosenBlock(self.statistics.load(directory, block), tuple(kept), repaired)


def _kept_path(directory: Path, block: int) -> Path:
    return directory / f"kept-{block:05d}.json"


def _visit(
    source: WeightSource,
    windows: Windows,
    choose: ChooseChannels,
    directory: Path,
    block: StreamedBlock,
) -> ChosenBlock:
    distances, observed = DistanceSums(), Observation(windows.held_out_N, block.ffns)
    block.advance(observed.add, distances.add)
    statistics = statistics_of(block.index, distances, observed.channels)
    kept = tuple(choose(block.index, statistics))
    family, kept_width = source.family, len(kept) // block.ffns
    solutions, experts, tensors = [], [], {}
    for ffn in range(block.ffns):
        name = family.weight_name(block.index, family.down, ffn)
        down_DF = family.transposed(source.read(name)).to(observed.device)
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
            solution = repair_down_projection(down_DF, own, gram_FF, held_out_RF)
        solutions.append(solution)
        errors = round(solution.error_before, 6), round(solution.error_after, 6)
        kept_new = solution.ridge is not None
        experts.append(ExpertRepair(*errors, kept_new, solution.ridge, few))
        tensors[name] = family.transposed(solution.down_DK).contiguous()
    repair = _of_block(solutions, tuple(experts))
    file = write_tensors(directory, block.index, tensors) if repair.kept else None
    return ChosenBlock(statistics, kept, RepairedBlock(repair, file))


def _of_block(solutions: Sequence[RidgeSolution], experts: tuple[ExpertRepair, ...]) -> BlockRepair:
    """Return what was done with all FFNs of a block together."""
    strengths = [solution.ridge for solution in solutions if solution.ridge is not None]
    energy = sum(solution.energy for solution in solutions) or 1.0

    def mean(errors: Sequence[float]) -> float:
        if len(errors) == 1:
            return round(errors[0], 6)
        pairs = zip(errors, solutions, strict=True)
        return round(sum(error * solution.energy for error, solution in pairs) / energy, 6)

    return BlockRepair(
        1,
        mean([solution.error_before for solution in solutions]),
        mean([solution.error_after for solution in solutions]),
        bool(strengths),
        median_low(strengths) if strengths else None,
        experts=experts if len(experts) > 1 else (),
    )


def _warn_of_unrepaired(chosen: Sequence[ChosenBlock]) -> None:
    """Tell people which experts saw too few tokens to be repaired."""
    few = [
        f"block {index} experts {', '.join(experts)}"
        for index, block in enumerate(chosen)
        if (
            experts := [
                str(i)
                for i, expert in enumerate(block.repaired.repair.experts)
                if expert.few_tokens
            ]
        )
    ]
    if few:
        log.warning(
            "not repaired, because they saw fewer than %d tokens in the fit or %d in the held-out "
            "windows: %s",
            LEAST_TOKENS,
            LEAST_HELD_OUT,
            "; ".join(few),
        )

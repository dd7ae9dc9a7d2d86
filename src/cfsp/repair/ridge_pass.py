"""The pass of ridge repair: statistics, choice of channels and repair, block by block, in one pass.

Repair needs the Gram matrix of every FFN of a block (0.8 GB at 14336 channels), so a process alone
never holds those of two blocks: a block's channels are chosen as soon as its windows have passed,
its down projections are repaired and written to the work directory, and the Gram matrices are
dropped, one after the other. Of several processes each repairs a block of its own. Widths must
therefore be known beforehand: from a plan, or from a coarse pass over a few windows. A block
without FFN units just passes: its distances are gathered.

Shapes: D hidden, F FFN channels, K channels that stay, E experts.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibration.calibrate import (
    StatisticsFiles,
    calibration_record,
    check_seen,
    check_tokens,
    observe_part,
)
from cfsp.calibration.statistics import ObservedBlock, UnitStatistics
from cfsp.calibration.together import add_up_block, part_of
from cfsp.checkpoint.ffn_tensors import down_matrix, parameters_with_down
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.reading import units_of_block
from cfsp.engine.block_pass import pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.engine.memory import available_bytes
from cfsp.processes import processes_on_machine
from cfsp.repair.observation import Observation
from cfsp.repair.repaired import (
    BlockRepair,
    ExpertRepair,
    RepairedBlock,
    facts_of,
    repaired_from,
    write_tensors,
)
from cfsp.repair.ridge import RidgeSolution, leave_as_it_is, repair_down_projection

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.processes import Team
    from cfsp.text.windows import Windows

NAME = "ridge"

# An expert that saw fewer tokens outside the held-out windows, or in them, is not repaired.
LEAST_TOKENS = 32
LEAST_HELD_OUT = 8

# From the index of an FFN unit in the model and its statistics to the channels that stay.
ChooseChannels = Callable[[int, UnitStatistics], Sequence[int]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenBlock:
    """What the pass did with one block.

    Attributes:
        observed: statistics of all windows, as calibration gathers them.
        kept: channels that stay in each of its FFN units, ascending.
        repaired: what repair did with each, None of an attention that goes whole; of none in a
            block that does.
    """

    observed: ObservedBlock
    kept: tuple[tuple[int, ...], ...]
    repaired: tuple[RepairedBlock | None, ...]


def choose_and_repair(
    source: WeightSource,
    windows: Windows,
    choose: ChooseChannels,
    engine: Engine,
    place: Workplace,
    *,
    seed: int = 0,
    removed: Collection[int] = (),
) -> list[ChosenBlock]:
    """Pass all windows through the model once; choose and repair in every block.

    Args:
        source: the model.
        windows: two or more; some are held out from the fit (see `cfsp.text.hold_out`).
        choose: gives the channels that an FFN unit keeps, from its index and statistics.
        engine: where and in what to compute; sums are float32, the solve is float64.
        place: where new tensors go, until they are in the new checkpoint.
        seed: that the windows were drawn by, for the record.
        removed: blocks that go whole; their statistics are gathered, and nothing is repaired.

    Raises:
        CalibrationError: a weight or an activation is NaN or infinite.
        ResumeError: the workplace holds unfinished work of something else.
    """
    check_tokens(source.config, windows.tokens_NT, source.label)
    _warn_of_memory(source, engine, place.team)
    record = calibration_record(source, windows, engine, seed=seed)
    own = part_of(windows, place.team, engine.batch_windows)
    directory = place.first_directory_of(NAME)
    repair = _RidgeRepair(
        source, windows.held_out_N[own], choose, directory, place.team, frozenset(removed)
    )
    observed = pass_blocks(
        source,
        windows.part(own),
        repair.visit,
        StatisticsFiles(record),
        name=NAME,
        device=engine.device,
        dtype=engine.dtype,
        batch_windows=engine.batch_windows,
        place=place,
        may_stop_after=repair.ends_turn,
        team=place.team,
    )
    chosen = [repair.chosen(each, block) for block, each in enumerate(observed)]
    _warn_of_unrepaired(chosen)
    return chosen


class _RidgeRepair:
    """Lets the windows pass block after block; of N processes each repairs every Nth.

    Processes take turns: the Gram matrices of a block are added up at the one that repairs it, and
    when each has a block, all repair at the same time. What was chosen and repaired is in files in
    the directory of the first, so that every process can read it.
    """

    def __init__(
        self,
        source: WeightSource,
        is_held_out_N: Tensor,
        choose: ChooseChannels,
        directory: Path,
        team: Team,
        removed: frozenset[int],
    ) -> None:
        self._source, self._choose, self._directory = source, choose, directory
        self._is_held_out_N, self._team, self._removed = is_held_out_N, team, removed
        self._waiting: tuple[int, ObservedBlock, list[Observation]] | None = None

    def ends_turn(self, block: int) -> bool:
        """Return whether all blocks so far are repaired when this one has been visited."""
        is_last = block + 1 == self._source.architecture.block_count
        return is_last or (block + 1) % self._team.size == 0

    def visit(self, block: StreamedBlock) -> ObservedBlock:
        """Let the windows pass one block; repair it now, or when the others have one as well."""
        observed = self._observe(block)
        if self.ends_turn(block.index):
            self._team.each_does(self._repair_waiting)
        return observed

    def chosen(self, observed: ObservedBlock, block: int) -> ChosenBlock:
        """Return what was done with a block that was visited."""
        if block in self._removed:
            return ChosenBlock(observed, ((),) * len(observed.units), ())
        units = json.loads(_chosen_path(self._directory, block).read_text(encoding="utf-8"))
        return ChosenBlock(
            observed,
            tuple(tuple(unit["kept"]) for unit in units),
            tuple(
                None
                if unit["repaired"] is None
                else repaired_from(unit["repaired"], self._directory, block)
                for unit in units
            ),
        )

    def _observe(self, block: StreamedBlock) -> ObservedBlock:
        units = () if block.index in self._removed else block.units
        observations = [Observation(self._is_held_out_N, unit.ffns) for unit in units]

        def add(unit: int, ffn: int, act_RF: Tensor, window_R: Tensor) -> None:
            observations[unit].add(ffn, act_RF, window_R)

        own = observe_part(block, on_activations=add if units else None)
        observed = add_up_block(own, self._team, block.device)
        check_seen(block.units, observed.units)
        if block.index in self._removed:
            return observed
        repairing = block.index % self._team.size
        for unit, observation in zip(units, observations, strict=True):
            observation.add_up_at(repairing, self._team, unit.columns, block.device)
        if self._team.rank == repairing:
            self._waiting = block.index, observed, observations
        return observed

    def _repair_waiting(self) -> None:
        """Choose what stays in the block that waits, if one does, and repair it."""
        if self._waiting is None:
            return
        (block, observed, observations), self._waiting = self._waiting, None
        facts = _repair_block(
            self._source, observed, observations, self._choose, self._directory, block
        )
        write_atomically(_chosen_path(self._directory, block), json.dumps(facts).encode())


def _facts_of(
    kept_U: Sequence[Sequence[int]], repaired_U: Sequence[RepairedBlock | None]
) -> list[dict[str, Any]]:
    """Return as JSON types what stays in the units of a block, and what was done with them."""
    return [
        {"kept": list(kept), "repaired": None if repaired is None else facts_of(repaired)}
        for kept, repaired in zip(kept_U, repaired_U, strict=True)
    ]


def _chosen_path(directory: Path, block: int) -> Path:
    return directory / f"chosen-{block:05d}.json"


def _repair_block(
    source: WeightSource,
    observed: ObservedBlock,
    observations: list[Observation],
    choose: ChooseChannels,
    directory: Path,
    block: int,
) -> list[dict[str, Any]]:
    """Choose what stays in the FFN units of a block, repair them, and write the new tensors.

    Args:
        source: the model.
        observed: statistics of the block.
        observations: what its units showed of all windows; used up.
        choose: gives the channels that a unit keeps.
        directory: where the new tensors go.
        block: index of the block.

    Returns:
        What was done, as `_facts_of` tells it.
    """
    indices = units_of_block(source, block)
    has_several = len({unit.block for unit in source.units}) < len(source.units)
    kept: list[tuple[int, ...]] = []
    repairs: list[BlockRepair | None] = []
    tensors: dict[str, Tensor] = {}
    for index, statistics in zip(indices, observed.units, strict=True):
        kept.append(tuple(choose(index, statistics)))
        # Dropped when the unit is done: the Gram matrices of its FFNs are the most there is.
        observation = observations.pop(0)
        if not kept[-1]:  # an attention that goes whole
            repairs.append(None)
            continue
        solutions, repair = _repair_unit(source, index, kept[-1], observation)
        if has_several:
            repair = replace(repair, block=block, path=source.units[index].path)
        repairs.append(repair)
        if repair.kept:
            down_of = {ffn: solution.down_DK for ffn, solution in solutions.items()}
            tensors |= parameters_with_down(source, index, down_of)
    file = write_tensors(directory, block, tensors) if tensors else None
    repaired = [
        None if repair is None else RepairedBlock(repair, file if repair.kept else None)
        for repair in repairs
    ]
    return _facts_of(kept, repaired)


def _repair_unit(
    source: WeightSource, index: int, kept: Sequence[int], observed: Observation
) -> tuple[dict[int, RidgeSolution], BlockRepair]:
    """Return the repaired down projections of the FFNs of a unit, and what was done with them.

    Of experts that go whole there are none.
    """
    unit = source.units[index]
    kept_of: dict[int, list[int]] = {}
    for channel in kept:
        kept_of.setdefault(channel // unit.width, []).append(channel % unit.width)
    solutions, experts = {}, []
    for ffn, own_K in kept_of.items():
        down_DF = down_matrix(source, index, ffn).to(observed.device)
        own = unit.columns_of(own_K)
        # A dense FFN has as many tokens as the user gave it; of experts some see very few.
        few = unit.ffns > 1 and (
            observed.gram_E[ffn].tokens < LEAST_TOKENS
            or observed.held_out_rows(ffn) < LEAST_HELD_OUT
        )
        held_out_RF = observed.held_out_RF(ffn, unit.width)
        if few:
            solution = leave_as_it_is(down_DF, own, held_out_RF)
        else:
            gram_FF = observed.gram_E[ffn].mean()
            solution = repair_down_projection(down_DF, own, gram_FF, held_out_RF)
        solutions[ffn] = solution
        errors = round(solution.error_before, 6), round(solution.error_after, 6)
        kept_new = solution.ridge is not None
        experts.append(ExpertRepair(*errors, kept_new, solution.ridge, few))
    return solutions, _of_unit(list(solutions.values()), tuple(experts))


def _of_unit(solutions: Sequence[RidgeSolution], experts: tuple[ExpertRepair, ...]) -> BlockRepair:
    """Return what was done with all FFNs of a unit together."""
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


def gram_bytes(source: WeightSource, block: int) -> int:
    """Return what the Gram matrices of one block take: one, float32, for each FFN of its units."""
    units = [source.units[index] for index in units_of_block(source, block)]
    return sum(unit.ffns * unit.columns**2 * torch.float32.itemsize for unit in units)


def _warn_of_memory(source: WeightSource, engine: Engine, team: Team) -> None:
    """Tell people where the Gram matrices of a block are more than there is memory.

    Of several processes each has those of the block that it is to repair beside the next one's.
    """
    needed, block = max((gram_bytes(source, unit.block), unit.block) for unit in source.units)
    needed *= min(team.size, 2)
    available = available_bytes() / processes_on_machine()
    if engine.device.type == "cpu" and needed > available:
        log.warning(
            "the Gram matrices of block %d take %.1f GB, %.1f GB are available: --repair none does "
            "without them",
            block,
            needed / 1e9,
            available / 1e9,
        )


def _warn_of_unrepaired(chosen: Sequence[ChosenBlock]) -> None:
    """Tell people which experts saw too few tokens to be repaired."""
    few = []
    for index, block in enumerate(chosen):
        for repaired in filter(None, block.repaired):
            experts = [
                str(i) for i, expert in enumerate(repaired.repair.experts) if expert.few_tokens
            ]
            if experts:
                path = f" {repaired.repair.path}" if repaired.repair.path else ""
                few.append(f"block {index}{path} experts {', '.join(experts)}")
    if few:
        log.warning(
            "not repaired, because they saw fewer than %d tokens in the fit or %d in the held-out "
            "windows: %s",
            LEAST_TOKENS,
            LEAST_HELD_OUT,
            "; ".join(few),
        )

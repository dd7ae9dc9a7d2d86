"""The pass of ridge repair: statistics, choice of channels and repair, block by block, in one pass.

Repair needs the Gram matrix of every FFN of a block (0.8 GB at 14336 channels), so a process alone
never holds those of two blocks: they are dropped when its down projections are repaired. Of several
processes each repairs a block of its own. Widths must therefore be known beforehand: from a plan,
or from a coarse pass over a few windows. The matrices are the dense model's, so one pass repairs
what any number of plans leave.

Shapes: D hidden, F FFN channels, K channels that stay, E experts, U units of the model.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from cfsp.architecture.found import Unit
from cfsp.calibration.calibrate import added_up, check_seen, observe
from cfsp.calibration.observed import ObservedBlock
from cfsp.checkpoint.reading import WeightSource, down_matrix, parameters_with_down
from cfsp.job import Job
from cfsp.planning.importance import choose_channels
from cfsp.processes import processes_on_machine
from cfsp.repair.result import BlockRepair, PruningResult, add_step, write_tensors
from cfsp.repair.ridge import Observation, RidgeSolution, repair_down_projection
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import StreamedBlock, part_of
from cfsp.streaming.memory import available_bytes
from cfsp.text.windows import Windows

NAME = "ridge"

# An expert that saw fewer tokens outside the held-out windows, or in them, is not repaired.
LEAST_FITTED = 32
LEAST_HELD_OUT = 8

log = logging.getLogger(__name__)


# What each unit of a model is to keep: channels, or how many, which are then those that score most
# by what the pass sees. What goes whole keeps none.
Wanted = Sequence[int | Sequence[int]]
# The channels that stay in each unit of a block, ascending.
Kept = tuple[tuple[int, ...], ...]
# What repair did with each, None of an attention that goes whole; of none in a block that does.
Repairs = tuple[BlockRepair | None, ...]


@dataclass
class ChosenBlock:
    """What the pass did with one block."""

    observed: ObservedBlock  # of all windows, as calibration gathers them
    kept: Kept
    repaired: Repairs = ()


def choose_and_repair(
    job: Job, windows: Windows, wanted: Sequence[Wanted]
) -> list[list[ChosenBlock]]:
    """Pass all windows, of which some are held out, through the model once; repair every block.

    What was done is returned for each of what is wanted. Of blocks of which nothing stays there are
    statistics alone. Sums are float32, the solve is float64. New tensors go to the job's work
    directory, until they are in the new checkpoint.
    """
    _warn_of_memory(job, wanted)
    own = part_of(windows, job.work_dir.team, job.runtime.batch_windows)
    visitor = _RidgePass(job, windows, own, wanted)
    blocks = pass_blocks(job.source, windows.part(own), visitor, job.runtime, job.work_dir)
    chosen = [list(of_one) for of_one in zip(*blocks, strict=True)]
    for of_one in chosen:
        _warn_of_unrepaired(of_one)
    return chosen


def repair_by_plans(
    job: Job, results: Sequence[PruningResult], windows: Windows
) -> list[PruningResult]:
    """Repair what each of several plans leaves, in one pass over all windows."""
    chosen = choose_and_repair(job, windows, [result.plan.kept_channels for result in results])
    return [
        with_ridge(job, result, of_one, number)
        for number, (result, of_one) in enumerate(zip(results, chosen, strict=True))
    ]


def with_ridge(
    job: Job, result: PruningResult, chosen: Sequence[ChosenBlock], number: int = 0
) -> PruningResult:
    """Add what the pass did with each block to a decision, the nth of those wanted."""
    has_several = any(len(block.repaired) > 1 for block in chosen)
    repairs = [
        block.repaired or (None,) * (len(block.kept) if has_several else 1) for block in chosen
    ]
    return add_step(result, NAME, _directory_of(job, number), repairs)


def _directory_of(job: Job, number: int) -> Path:
    """Return where new tensors of one of several are, in a directory of the first process."""
    return job.work_dir.first_directory_of(NAME) / f"repaired-{number}"


class _RidgePass(Visitor[list[ChosenBlock]]):
    """Lets the windows pass block after block; of N processes each repairs every Nth.

    Processes take turns: the Gram matrices of a block are added up at the one that repairs it, and
    when each has a block, all repair at the same time and tell each other what they did. New
    tensors are in files in the directory of the first.
    """

    waits_for_others = True

    def __init__(self, job: Job, windows: Windows, own: slice, wanted: Sequence[Wanted]) -> None:
        super().__init__(NAME)
        self._source, self._criterion, self._team = job.source, job.criterion, job.work_dir.team
        self._wanted = wanted
        self._narrowed = narrowed_units(job.source, wanted)
        self._is_held_out_N = windows.held_out_N[own]
        self._directories = [_directory_of(job, number) for number in range(len(wanted))]
        # Of this turn: all blocks, and the one that this process repairs.
        self._turn: dict[int, list[ChosenBlock]] = {}
        self._waiting: tuple[int, list[Observation]] | None = None

    def may_stop_after(self, block: int) -> bool:
        """Return whether all blocks so far are repaired when this one has been visited."""
        is_last = block + 1 == self._source.architecture.block_count
        return is_last or (block + 1) % self._team.size == 0

    def visit(self, block: StreamedBlock) -> list[ChosenBlock]:
        """Let the windows pass one block; repair it now, or when the others have one as well."""
        chosen = self._turn[block.index] = self._observe(block)
        if self.may_stop_after(block.index):
            for found in self._team.each_does(self._repair_waiting):
                for index, done in found.items():
                    for one, (kept, repaired) in zip(self._turn[index], done, strict=True):
                        one.kept, one.repaired = kept, repaired
            self._turn.clear()
        return chosen

    def save(self, result: list[ChosenBlock], directory: Path, block: int) -> None:
        result[0].observed.save(directory, block)
        facts: Any = [{"kept": one.kept, "repaired": one.repaired} for one in result]
        super().save(facts, directory, block)

    def load(self, directory: Path, block: int) -> list[ChosenBlock]:
        observed = ObservedBlock.load(directory, block)
        facts: Any = super().load(directory, block)
        return [
            ChosenBlock(observed, tuple(map(tuple, one["kept"])), tuple(one["repaired"]))
            for one in facts
        ]

    def _observe(self, block: StreamedBlock) -> list[ChosenBlock]:
        indices = [index for index, _ in self._units_of(block.index)]
        stays = any(keep_U[index] for keep_U in self._wanted for index in indices)
        units = block.units if stays else ()
        observations = [Observation(self._is_held_out_N, unit.ffns) for unit in units]
        is_narrowed = [index in self._narrowed for index in indices]

        def add(unit: int, *rows: Any) -> None:
            if is_narrowed[unit]:
                observations[unit].add(*rows)

        observed = added_up(self._team, observe(block, add if any(is_narrowed) else None))
        check_seen(block.units, observed.units)
        repairing = block.index % self._team.size
        for unit, observation, narrowed in zip(units, observations, is_narrowed, strict=False):
            if narrowed:
                observation.add_up_at(repairing, self._team, unit.columns, block.device)
        if stays and self._team.rank == repairing:
            self._waiting = block.index, observations
        return [ChosenBlock(observed, ((),) * len(indices)) for _ in self._wanted]

    def _units_of(self, block: int) -> list[tuple[int, Unit]]:
        """Return the units of a block, with their indices in the model."""
        return [pair for pair in enumerate(self._source.units) if pair[1].block == block]

    def _repair_waiting(self) -> dict[int, list[tuple[Kept, Repairs]]]:
        """Choose what stays in the block that waits, if one does, and repair it."""
        if self._waiting is None:
            return {}
        (block, observations), self._waiting = self._waiting, None
        has_several = len({unit.block for unit in self._source.units}) < len(self._source.units)
        seen_U = self._turn[block][0].observed.units
        done: list[tuple[list[tuple[int, ...]], list[BlockRepair | None], dict[str, Tensor]]]
        done = [([], [], {}) for _ in self._wanted]
        for (index, unit), seen in zip(self._units_of(block), seen_U, strict=True):
            # Dropped when the unit is done: the Gram matrices of its FFNs are the most there is.
            observation = observations.pop(0)
            for keep_U, (kept_U, repairs, tensors) in zip(self._wanted, done, strict=True):
                keep = keep_U[index]
                if isinstance(keep, int):
                    keep = choose_channels(self._source, unit, seen, keep, self._criterion)
                kept_U.append(tuple(keep))
                if not keep:  # a block or an attention that goes whole
                    repairs.append(None)
                    continue
                repair, down_of = _repair_unit(self._source, unit, keep, observation)
                if has_several:
                    repair = {"block": block, "path": unit.path, **repair}
                repairs.append(repair)
                if repair["kept"]:
                    tensors |= parameters_with_down(self._source, unit, down_of)
        for directory, (*_, tensors) in zip(self._directories, done, strict=True):
            if tensors:
                directory.mkdir(parents=True, exist_ok=True)
                write_tensors(directory, block, tensors)
        return {block: [(tuple(kept_U), tuple(repairs)) for kept_U, repairs, _ in done]}


def _repair_unit(
    source: WeightSource, unit: Unit, kept: Sequence[int], observed: Observation
) -> tuple[BlockRepair, dict[int, Tensor]]:
    """Return what was done with the FFNs of a unit that stay, and their down projections."""
    kept_of: dict[int, list[int]] = {}
    for channel in kept:
        kept_of.setdefault(channel // unit.width, []).append(channel % unit.width)
    solutions: dict[int, RidgeSolution] = {}
    few: list[int] = []
    for ffn, own_K in kept_of.items():
        down_DF = down_matrix(source, unit, ffn).to(observed.device)
        gram, held_out_RF = observed.gram_E[ffn], observed.held_out_RF(ffn, unit.columns)
        # A dense FFN has as many tokens as the user gave it; of experts some see very few.
        sees_few = gram.tokens < LEAST_FITTED or len(held_out_RF) < LEAST_HELD_OUT
        is_cut = len(own_K) < unit.width
        if is_cut and unit.ffns > 1 and sees_few:
            few.append(ffn)
        gram_FF = gram.mean() if is_cut and ffn not in few else None
        columns = unit.columns_of(own_K)
        solutions[ffn] = repair_down_projection(down_DF, columns, gram_FF, held_out_RF)
    of_all = solutions.values()
    energy = sum(each.energy for each in of_all) or 1.0
    strengths = [each.ridge for each in of_all if each.ridge is not None]
    repair: BlockRepair = {
        "error_before": round(sum(each.error_before * each.energy for each in of_all) / energy, 6),
        "error_after": round(sum(each.error_after * each.energy for each in of_all) / energy, 6),
        "kept": bool(strengths),
        "strength": median_low(strengths) if strengths else None,
        "loss_before": None,
        "loss_after": None,
    }
    if few:
        repair["few_tokens"] = few
    return repair, {ffn: solution.down_DK for ffn, solution in solutions.items()}


def narrowed_units(source: WeightSource, wanted: Sequence[Wanted]) -> dict[int, Unit]:
    """Return the units of which some channels go and others stay, by their index in the model."""

    def is_narrowed(unit: Unit, keep: int | Sequence[int]) -> bool:
        kept, every = (keep, 1) if isinstance(keep, int) else (len(keep), unit.ffns)
        return 0 < kept < every * unit.width

    return {
        index: unit
        for index, unit in enumerate(source.units)
        if any(is_narrowed(unit, keep_U[index]) for keep_U in wanted)
    }


def gram_bytes(units: Iterable[Unit]) -> dict[int, int]:
    """Return what the Gram matrices of units take, by block: one of each FFN, float32."""
    of_block: Counter[int] = Counter()
    for unit in units:
        of_block[unit.block] += unit.ffns * unit.columns**2 * torch.float32.itemsize
    return of_block


def _warn_of_memory(job: Job, wanted: Sequence[Wanted]) -> None:
    """Tell people where the Gram matrices of a block are more than there is memory."""
    of_block = gram_bytes(narrowed_units(job.source, wanted).values()) or {0: 0}
    needed, block = max((needed, block) for block, needed in of_block.items())
    # Of several processes each has those that it is to repair beside the next block's.
    needed *= min(job.work_dir.team.size, 2)
    available = available_bytes() / processes_on_machine()
    if job.runtime.device.type == "cpu" and needed > available:
        log.warning(
            f"the Gram matrices of block {block} take {needed / 1e9:.1f} GB, {available / 1e9:.1f} "
            "GB are available: --repair none does without them"
        )


def _warn_of_unrepaired(chosen: Sequence[ChosenBlock]) -> None:
    """Tell people which experts saw too few tokens to be repaired."""
    few = []
    for index, block in enumerate(chosen):
        for repair in filter(None, block.repaired):
            if unseen := repair.get("few_tokens"):
                path = f" {repair['path']}" if repair.get("path") else ""
                few.append(f"block {index}{path} experts {', '.join(map(str, unseen))}")
    if few:
        log.warning(
            f"not repaired, because they saw fewer than {LEAST_FITTED} tokens in the fit or "
            f"{LEAST_HELD_OUT} in the held-out windows: {'; '.join(few)}"
        )

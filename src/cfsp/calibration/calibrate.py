"""Calibration: one forward pass over the windows, giving Statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.architecture.found import Unit
from cfsp.calibration.accumulators import BlockSums, run_distances, sampled, sampled_stride
from cfsp.calibration.observed import CalibrationRecord, ObservedBlock, UnitStatistics
from cfsp.calibration.statistics import Statistics
from cfsp.calibration.together import add_up, part_of
from cfsp.checkpoint.reading import WeightSource, fingerprint
from cfsp.checkpoint.skeleton import architecture_of
from cfsp.checkpoint.text_config import vocabulary_of
from cfsp.errors import CalibrationError, ResumeError, UsageError
from cfsp.processes import Team
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import OnActivations, StreamedBlock
from cfsp.streaming.runtime import Runtime
from cfsp.streaming.work_dir import WorkDir
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def calibrate(
    source: WeightSource,
    windows: Windows,
    runtime: Runtime,
    *,
    seed: int = 0,
    work_dir: WorkDir | None = None,
    name: str = "calibrate",
    runs: bool = False,
) -> Statistics:
    """Run all windows through the model once, block by block, and gather statistics.

    Each process of a team has a part of the windows; where there are fewer batches than processes,
    some have nothing to do.
    """
    team = Team() if work_dir is None else work_dir.team
    check_tokens(source.config, windows.tokens_NT, source.label)
    own = windows.part(part_of(windows, team, runtime.batch_windows))
    if len(own.tokens_NT):
        stride = sampled_stride(own) if runs else None
        visitor = _Calibration(name, stride, is_alone=team.size == 1)
        observed = pass_blocks(source, own, visitor, runtime, work_dir)
    else:
        blocks = range(source.architecture.block_count)
        observed = [BlockSums(source.architecture.units_of(i)).observed(i) for i in blocks]
    total = add_up(observed, team, runtime.device)
    statistics = Statistics.of(total, calibration_record(source, windows, runtime, seed=seed))
    check_seen(source.units, statistics.units)
    if not runs:
        return statistics
    return replace(statistics, runs=run_distances(observed, team, runtime.device))


class _Calibration(Visitor[ObservedBlock]):
    """Gathers the statistics of every block."""

    def __init__(self, name: str, stride: int | None, *, is_alone: bool) -> None:
        super().__init__(name)
        self._stride, self._is_alone = stride, is_alone

    def visit(self, block: StreamedBlock) -> ObservedBlock:
        observed = observe(block, stride=self._stride)
        if self._is_alone:  # else the tokens of another process may reach an expert
            check_seen(block.units, observed.units)
        return observed

    def save(self, result: ObservedBlock, directory: Path, block: int) -> None:
        result.save(directory, block)

    def load(self, directory: Path, block: int) -> ObservedBlock:
        found = ObservedBlock.load(directory, block)
        if self._stride is not None and found.passing is None:
            work_dir = directory.parents[1]
            raise ResumeError(
                f"{work_dir} holds unfinished work that did not compare runs of blocks: there was "
                "memory for the whole model then; free as much, or start over with: "
                f"rm -r {work_dir}"
            )
        return found


def calibration_record(
    source: WeightSource, windows: Windows, runtime: Runtime, *, seed: int
) -> CalibrationRecord:
    """Return the conditions of a calibration, for its statistics and plans."""
    return CalibrationRecord(
        model=source.label,
        fingerprint=fingerprint(source),
        sources=windows.sources,
        tokens_digest=windows.digest,
        windows=windows.tokens_NT.shape[0],
        seqlen=windows.tokens_NT.shape[1],
        seed=seed,
        dtype=str(runtime.dtype).removeprefix("torch."),
        device=runtime.device.type,
        bos=windows.bos,
    )


def observe(
    block: StreamedBlock,
    on_activations: OnActivations | None = None,
    stride: int | None = None,
) -> ObservedBlock:
    """Let the windows pass one block and return its statistics.

    All activations are shown besides (see `StreamedBlock.advance`); where there is a stride, the
    hidden states of one of so many tokens are kept.
    """
    sums = BlockSums(block.units)
    passing: list[Tensor] = []

    def on_act(unit: int, ffn: int, act_RF: Tensor, window_R: Tensor) -> None:
        sums.channels[unit].add(act_RF, ffn)
        if on_activations is not None:
            on_activations(unit, ffn, act_RF, window_R)

    def on_hidden(input_BTD: Tensor, output_BTD: Tensor) -> None:
        sums.distance.add(input_BTD, output_BTD)
        if stride is not None:
            passing.append(sampled(stride, input_BTD, output_BTD))

    block.advance(
        on_act,
        on_hidden,
        lambda unit, before_BTD, after_BTD: sums.sublayers[unit].add(before_BTD, after_BTD),
        sums.outputs.add,
    )
    return sums.observed(block.index, torch.cat(passing, dim=1) if passing else None)


def check_seen(units: Sequence[Unit], statistics: Sequence[UnitStatistics]) -> None:
    """Check that tokens have reached every unit, by its statistics."""
    for unit, found in zip(units, statistics, strict=True):
        if not bool(found.sum_of_squares_F.any()):
            raise CalibrationError(
                f"no calibration token reached {unit.path or 'the FFN'} of block {unit.block}; "
                "give more --samples"
            )


def check_tokens(config: PreTrainedConfig, tokens_NT: Tensor, label: str) -> None:
    """Check that every token id, and every position, has an embedding."""
    highest, vocabulary = int(tokens_NT.max()), vocabulary_of(config)
    if highest >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives token id {highest}, but {label} has a vocabulary of "
            f"{vocabulary}; use the model's own tokenizer"
        )
    most, length = architecture_of(config).learnt_positions, tokens_NT.shape[1]
    if most is not None and length > most:
        raise UsageError(
            f"{label} has learnt {most} positions, the windows have {length} tokens; "
            f"give a --seqlen of at most {most}"
        )

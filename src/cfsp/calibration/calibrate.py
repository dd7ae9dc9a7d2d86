"""Calibration: one forward pass over the windows, giving Statistics of streaming sums.

Shapes: B windows, T tokens, S tokens of a sample, D hidden, F FFN channels, E experts, R rows.

Sums of a batch are kept as float32 and added up in float64, which is exact while they differ by
less than 2^29: the order in which batches come, and so the number of processes, leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cfsp.architecture.found import Unit
from cfsp.calibration.observed import (
    BlockStatistics,
    CalibrationRecord,
    ObservedBlock,
    UnitStatistics,
)
from cfsp.calibration.statistics import RunDistances, Statistics
from cfsp.checkpoint.text_config import longest_input_of, vocabulary_of
from cfsp.errors import CalibrationError, UsageError
from cfsp.job import Job
from cfsp.processes import Team
from cfsp.streaming.block_pass import Visitor, pass_blocks
from cfsp.streaming.block_stream import OnActivations, StreamedBlock, part_of
from cfsp.streaming.runtime import no_number
from cfsp.text.windows import Windows

# Rows of activations that are summed at once: on a CPU their float32 copy should stay in the cache,
# an accelerator is given few and large things to do.
_ROWS, _ROWS_ELSEWHERE = 256, 4096
SAMPLED_TOKENS = 1024  # in all: their hidden states at every block are in memory


class DistanceSum:
    """Angular distance between a block's input and output hidden states, summed over tokens.

    Per token, in float32, with h the input and h' the output (D values each):

        arccos(clamp(cos(h, h'), -1, 1)) / pi   (CFSP Eq. 3, in [0, 1])
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._total: Tensor | float = 0.0

    def add(self, input_BTD: Tensor, output_BTD: Tensor) -> None:
        """Add the tokens of one batch."""
        before = input_BTD.flatten(0, 1).float()
        after = output_BTD.flatten(0, 1).float()
        before_norm = torch.linalg.vector_norm(before, dim=1)
        after_norm = torch.linalg.vector_norm(after, dim=1)
        tiny = torch.finfo(torch.float32).tiny
        cosine = (before * after).sum(1) / (before_norm * after_norm).clamp_min(tiny)
        angular = torch.arccos(cosine.clamp(-1.0, 1.0)) / math.pi
        # Kept where it was computed: to ask an accelerator for a number is to wait for it.
        self._total = self._total + angular.sum(dtype=torch.float64).float().double()
        self.tokens += before.shape[0]

    @property
    def total(self) -> float:
        """Sum over all tokens added so far."""
        return float(self._total)


class UnitSums:
    """Sums of one unit: squares of every channel's activation, L2 norms of what every expert adds.

    Both are float64. Channels of several FFNs (experts) are numbered through, one FFN after the
    other. What an expert adds to a token is its output times the router's weight.
    """

    def __init__(self, ffns: int = 1, removable_experts: int = 0) -> None:
        self.tokens_E = [0] * ffns
        self.sum_of_squares_F: Tensor | None = None
        self.output_norm_E = torch.zeros(removable_experts, dtype=torch.float64)
        self.sublayer = DistanceSum()  # of an attention

    def add(self, act_BTF: Tensor, ffn: int = 0) -> None:
        """Add tokens of one batch: the input of the down projection of one FFN."""
        rows = act_BTF.flatten(0, -2)
        width = rows.shape[1]
        if self.sum_of_squares_F is None:
            channels = len(self.tokens_E) * width
            self.sum_of_squares_F = torch.zeros(channels, dtype=torch.float64, device=rows.device)
        own = slice(ffn * width, (ffn + 1) * width)
        for part in torch.split(rows, _ROWS if rows.device.type == "cpu" else _ROWS_ELSEWHERE):
            # Not in place: of float32 activations `float` gives the block's own tensor, no copy.
            self.sum_of_squares_F[own] += part.float().square().sum(0)
        self.tokens_E[ffn] += rows.shape[0]

    def add_output(self, expert: int, output_RD: Tensor) -> None:
        """Add tokens of one batch: what one expert adds."""
        if len(self.output_norm_E):
            norm_R = torch.linalg.vector_norm(output_RD.float(), dim=1)
            self.output_norm_E = self.output_norm_E.to(norm_R.device)
            self.output_norm_E[expert] += norm_R.sum(dtype=torch.float64).float()

    def statistics(self, unit: Unit, tokens: int) -> UnitStatistics:
        """Return the statistics of the unit, when so many tokens have passed its block."""
        squares_F = self.sum_of_squares_F
        if squares_F is None:  # no token was routed to any expert
            squares_F = torch.zeros(unit.ffns * unit.columns, dtype=torch.float64)
        return UnitStatistics(
            block=unit.block,
            sum_of_squares_F=squares_F.cpu(),
            tokens=tokens,
            routed_E=tuple(self.tokens_E) if unit.ffns > 1 else (),
            part=unit.part,
            distance_sum=self.sublayer.total if unit.after is not None else None,
            output_norm_E=self.output_norm_E.cpu(),
        )


def added_up(team: Team, own: ObservedBlock | None) -> ObservedBlock:
    """Return what all processes together observed in a block; of one without windows, None."""
    found = [each for each in team.gather(own and replace(own, passing=None)) if each is not None]
    block = BlockStatistics(
        sum(each.block.distance_sum for each in found), sum(each.block.tokens for each in found)
    )
    units = tuple(map(_unit_added_up, zip(*(each.units for each in found), strict=True)))
    return ObservedBlock(block, units)


def _unit_added_up(parts: Sequence[UnitStatistics]) -> UnitStatistics:
    distances = [part.distance_sum for part in parts if part.distance_sum is not None]
    return replace(
        parts[0],
        sum_of_squares_F=torch.stack([part.sum_of_squares_F for part in parts]).sum(0),
        tokens=sum(part.tokens for part in parts),
        routed_E=tuple(map(sum, zip(*(part.routed_E for part in parts), strict=True))),
        distance_sum=sum(distances) if distances else None,
        output_norm_E=torch.stack([part.output_norm_E for part in parts]).sum(0),
    )


def run_distances(observed: Sequence[ObservedBlock | None], team: Team) -> RunDistances:
    """Return the angular distances over all runs of blocks, of some tokens of all processes."""
    passing_L = [each.passing for each in observed if each is not None and each.passing is not None]
    sums = torch.zeros(len(observed) + 1, len(observed) + 1, dtype=torch.float64)
    tokens = 0
    if passing_L:  # else this process has no window
        states = [passing_L[0][0], *(passing[1] for passing in passing_L)]
        unit = [torch.nn.functional.normalize(state.float(), dim=-1) for state in states]
        tokens = len(unit[0])
        for first, before_SD in enumerate(unit):
            for end in range(first + 1, len(unit)):
                cosine_S = (before_SD * unit[end]).sum(-1).clamp(-1.0, 1.0)
                sums[first, end] = (torch.arccos(cosine_S) / math.pi).double().sum()
    of_all = team.gather((sums, tokens))
    rows = torch.stack([each for each, _ in of_all]).sum(0).tolist()
    return RunDistances(tuple(map(tuple, rows)), sum(count for _, count in of_all))


def calibrate(
    job: Job, windows: Windows, name: str = "calibrate", *, runs: bool = False
) -> Statistics:
    """Run all windows through the model once, block by block, and gather statistics."""
    source, team = job.source, job.work_dir.team
    own = windows.part(part_of(windows, team, job.runtime.batch_windows))
    observed: list[ObservedBlock | None] = [None] * source.architecture.block_count
    if len(own.tokens_NT):  # else there are fewer batches than processes
        # Of all windows, so that the number of processes leaves no trace.
        count, seqlen = windows.tokens_NT.shape
        stride = max(1, min(seqlen, count * seqlen // SAMPLED_TOKENS)) if runs else None
        visitor = _Calibration(name, stride, is_alone=team.size == 1)
        observed = [*pass_blocks(source, own, visitor, job.runtime, job.work_dir)]
    total = [added_up(team, each) for each in observed]
    statistics = Statistics.of(total, calibration_record(job, windows))
    check_seen(source.units, statistics.units)
    return replace(statistics, runs=run_distances(observed, team)) if runs else statistics


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
        return ObservedBlock.load(directory, block)


def calibration_record(job: Job, windows: Windows) -> CalibrationRecord:
    """Return the conditions of a calibration, for its statistics and plans."""
    return CalibrationRecord(
        model=job.source.label,
        fingerprint=job.source.fingerprint,
        sources=windows.sources,
        tokens_digest=windows.digest,
        windows=windows.tokens_NT.shape[0],
        seqlen=windows.tokens_NT.shape[1],
        seed=job.settings.text.seed,
        dtype=str(job.runtime.dtype).removeprefix("torch."),
        device=job.runtime.device.type,
        bos=windows.bos,
    )


def observe(
    block: StreamedBlock, on_activations: OnActivations | None = None, stride: int | None = None
) -> ObservedBlock:
    """Let the windows pass one block and return its statistics.

    All activations are shown besides (see `StreamedBlock.advance`); where there is a stride, the
    hidden states of one of so many tokens are kept.
    """
    distance, passing = DistanceSum(), list[Tensor]()
    sums = [UnitSums(unit.ffns, unit.removable_experts) for unit in block.units]

    def on_act(unit: int, ffn: int, act_RF: Tensor, window_R: Tensor) -> None:
        sums[unit].add(act_RF, ffn)
        if on_activations is not None:
            on_activations(unit, ffn, act_RF, window_R)

    def on_hidden(input_BTD: Tensor, output_BTD: Tensor) -> None:
        distance.add(input_BTD, output_BTD)
        if stride is not None:
            # From amid the first so many on: the first token of a window is unlike all others.
            rows = [
                each[:, stride // 2 :: stride].flatten(0, 1) for each in (input_BTD, output_BTD)
            ]
            passing.append(torch.stack(rows).cpu())

    block.advance(
        on_act,
        on_hidden,
        lambda unit, before_BTD, after_BTD: sums[unit].sublayer.add(before_BTD, after_BTD),
        lambda unit, expert, output_RD, _: sums[unit].add_output(expert, output_RD),
    )
    pairs = zip(block.units, sums, strict=True)
    found = ObservedBlock(
        BlockStatistics(distance.total, distance.tokens),
        tuple(each.statistics(unit, distance.tokens) for unit, each in pairs),
        torch.cat(passing, dim=1) if passing else None,
    )
    if not (found.block.is_possible and all(unit.is_possible for unit in found.units)):
        raise no_number(f"block {block.index} produced NaN or infinite activations", block.dtype)
    return found


def check_seen(units: Sequence[Unit], statistics: Sequence[UnitStatistics]) -> None:
    """Check that tokens have reached an expert of every unit that routes them to some.

    Nothing that all tokens pass can be missed; its activations may still be zero, for all of them.
    """
    for unit, found in zip(units, statistics, strict=True):
        if found.routed_E and not any(found.routed_E):
            raise CalibrationError(
                f"no calibration token reached {unit.path or 'the FFN'} of block {unit.block}; "
                "give more --samples"
            )


def check_tokens(config: PreTrainedConfig, tokens_NT: Tensor, label: str) -> None:
    """Check that every token id has an embedding, and that the model can read so many at once."""
    highest, vocabulary = int(tokens_NT.max()), vocabulary_of(config)
    if highest >= vocabulary:
        raise CalibrationError(
            f"the tokenizer gives token id {highest}, but {label} has a vocabulary of "
            f"{vocabulary}; use the model's own tokenizer"
        )
    check_length(config, tokens_NT.shape[1], label)


def check_length(config: PreTrainedConfig, length: int, label: str) -> None:
    """Check that a model can read windows of so many tokens."""
    most = longest_input_of(config)
    if most is not None and length > most:
        raise UsageError(
            f"{label} can read {most} tokens at once, the windows have {length}; "
            f"give a --seqlen of at most {most}"
        )

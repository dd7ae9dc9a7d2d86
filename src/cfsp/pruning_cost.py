"""What is said before any work: what a prune takes, how small the model becomes, and doubts.

Sizes follow from shapes (docs/SCALE.md has the formulas). For the time one block of the model
computes one batch of random tokens, and everything else is taken to be proportional.

Shapes: N windows, T tokens.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cfsp.calibration.calibrate import observe
from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.planning.allocation import channels_in_words
from cfsp.planning.candidate import DropSizes
from cfsp.planning.importance import COARSE_WINDOWS
from cfsp.planning.make import parameters_of_channels
from cfsp.repair.ridge import Observation, factor, lower_panels
from cfsp.repair.ridge_pass import gram_bytes
from cfsp.selection.divergence import (
    BEGINNING_TOKENS,
    POSITION_STRIDE,
    follow_sensitivity,
    prediction_bytes,
    windows_compared,
)
from cfsp.settings import DEFAULT_SAMPLES, TargetParameters
from cfsp.streaming.block_stream import StreamedBlock, stream_blocks, windows_in_batch
from cfsp.streaming.memory import available_bytes, default_budget
from cfsp.streaming.runtime import needed_bytes
from cfsp.text.drawing import parts_with_shares
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.architecture.found import Unit
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.settings import Budget, PruneSettings
    from cfsp.streaming.runtime import Runtime

# Python, torch and transformers.
_INTERPRETER_BYTES = int(0.5e9)
# Of a tokenizer, for each entry of its vocabulary.
_TOKEN_BYTES = 1000
# Size of the matrix that the speed of the solve is measured with: smaller ones are slower.
_SOLVED = 2048
# So many strengths of the ridge are tried where the middle one or a stronger one is best.
_STRENGTHS = 3
# Of the share that was asked for, which goes of the model where most of it is elsewhere.
_LITTLE = 1 / 3
# Below so many parameters a model lost about twice as much: without 20% of their channels
# SmolLM2-135M has 1.27 times the perplexity and Qwen2.5-Coder-0.5B 1.15 (docs/RESULTS.md).
_SMALL = 300e6
# Of a small model, which goes without a word.
_HARMLESS = 0.05
# Fewer windows repair less well (docs/RESULTS.md, foreign text).
_FEW_WINDOWS = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningCost:
    """What a prune will take."""

    stages: dict[str, float]  # name -> seconds, in order
    memory_bytes: int  # the most at a time
    memory_available: int
    disk_bytes: int  # beside the output and into it, at most
    disk_available: int
    parameters_before: int
    parameters_after: int  # before widths are rounded to multiples
    bytes_after: int
    measured_tokens: int  # that one block was timed with

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """Return JSON types, with the sum over all stages."""
        stages = [{"name": name, "seconds": round(s, 1)} for name, s in self.stages.items()]
        return {**asdict(self), "stages": stages, "seconds": round(self.seconds, 1)}


class Rates(NamedTuple):
    """Seconds on this machine."""

    forward: float  # of one token through all blocks, with the sums of a calibration
    gram: float  # of the Gram matrices of one token in all blocks
    read: float  # of one byte of the checkpoint
    solve: float  # of one float64 operation of the solve


def pruning_cost(
    source: WeightSource, out: Path, settings: PruneSettings, runtime: Runtime
) -> PruningCost:
    """Return what a prune will take; one block is read and computes one batch.

    `out` is where the smaller model is to go, or a directory on the same disk; it need not exist.
    The settings are without local repair; a text with fewer windows than asked for is not noticed.
    """
    asked = _Asked(source, settings.suited_to_repair(), runtime)
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    before = parameter_count(source)
    return PruningCost(
        asked.stages(measured(asked)),
        asked.memory_bytes(),
        available_bytes(),
        asked.disk_bytes(),
        shutil.disk_usage(place).free,
        before,
        *(size_after(source, settings) or (before, asked.checkpoint_bytes)),
        asked.batch.tokens_NT.numel(),
    )


class _Asked:
    """A prune that is asked for, and the sizes that its costs follow from."""

    def __init__(self, source: WeightSource, settings: PruneSettings, runtime: Runtime) -> None:
        self.source, self.settings, self.runtime = source, settings, runtime
        self.repairs = settings.repair != "none"
        self.seqlen = settings.text.seqlen
        self.stays = 1 - settings.budget.sparsity
        self.windows = settings.text.windows
        self.hidden = int(text_config_of(source.config).hidden_size)
        self.vocabulary = vocabulary_of(source.config)
        self.checkpoint_bytes = sum(spec.nbytes for spec in source.specs.values())
        self.follows_sensitivity = follow_sensitivity(
            source, settings.criterion, runtime, has_images=False
        )
        architecture = source.architecture
        # Of every block.
        self.elements = [
            sum(source.specs[name].elements for name in source.stored.within(prefix))
            for prefix in map(architecture.block_prefix, range(architecture.block_count))
        ]
        tokens = self.windows * self.seqlen
        self.hidden_bytes = tokens * self.hidden * runtime.dtype.itemsize
        units = source.units
        self.down_names = [architecture.block_prefix(unit.block) + unit.down for unit in units]

    @cached_property
    def batch(self) -> Windows:
        """One batch of random tokens."""
        one = Windows(torch.zeros(1, self.seqlen, dtype=torch.int64), {})
        size = min(self.windows, windows_in_batch(one, self.runtime.batch_windows))
        shape, generator = (size, self.seqlen), torch.Generator().manual_seed(0)
        tokens_NT = torch.randint(self.vocabulary, shape, generator=generator)
        return Windows(tokens_NT, {"random tokens": size})

    def stages(self, rates: Rates) -> dict[str, float]:
        """Return the seconds of each part; a pass takes the longer of computing and reading."""
        reading = self.checkpoint_bytes * rates.read

        def one_pass(windows: float, gram: float = 0.0) -> float:
            """A pass of so many windows, with Gram matrices of a share of their full size."""
            return max(windows * self.seqlen * (rates.forward + gram * rates.gram), reading)

        first = min(self.windows, COARSE_WINDOWS) if self.repairs else self.windows
        found = {"coarse pass" if self.repairs else "calibrate": one_pass(first)}
        if self.follows_sensitivity:
            found["sensitivity"] = one_pass(self._sensitivity_windows())
        if self.repairs:
            solve = _STRENGTHS * rates.solve * sum(map(self._solve_flop, self.source.units))
            found |= {"ridge": one_pass(self.windows, 1.0), "solve": solve}
        return {**found, "cut": 2 * reading}

    def _sensitivity_windows(self) -> float:
        """Return as how many windows through all blocks it takes: half of them for each part."""
        drawn = parts_with_shares(self.settings.text.names, self.windows)
        sources = sum(share > 0 for _, share in drawn)
        windows = min(self.windows, windows_compared(sources))
        places = len({(unit.block, unit.part) for unit in self.source.units})
        # The head sees some positions, each time.
        head = self.vocabulary * self.hidden / sum(self.elements) / POSITION_STRIDE
        passes = 1 + places / 2 + (1 + places) * head
        return windows * min(self.seqlen, BEGINNING_TOKENS) / self.seqlen * passes

    def _solve_flop(self, unit: Unit) -> float:
        kept = round(unit.columns * self.stays)
        factor = kept**3 / 3 + 2.0 * self.hidden * kept**2
        return unit.ffns * (factor + 2.0 * self.hidden * kept * (unit.columns - kept))

    def memory_bytes(self) -> int:
        """Return the peak, as docs/SCALE.md works it out."""
        source, itemsize = self.source, self.runtime.dtype.itemsize
        around = (parameter_count(source) - sum(self.elements)) * itemsize
        block = max(self.elements) * itemsize
        width = max(unit.columns for unit in source.units)
        activations = self.batch.tokens_NT.numel() * (6 * width + 24 * self.hidden)
        peak = max(around + block, 2 * block + activations)
        if self.repairs:
            gram = max(gram_bytes(source, index) for index in {u.block for u in source.units})
            system = max(4 * round(width * self.stays) ** 2, 10 * self.hidden * width)
            peak = max(peak, 2 * block + activations + gram, block + gram + system)
        hidden, budget = self.hidden_bytes, self.settings.compute.memory_budget
        peak += hidden if hidden <= (default_budget() if budget is None else budget) else 0
        if self.follows_sensitivity:
            whole = needed_bytes(source, self.runtime.dtype) + prediction_bytes(self.vocabulary)
            peak = max(peak, whole)
        return peak + _INTERPRETER_BYTES + _TOKEN_BYTES * self.vocabulary

    def disk_bytes(self) -> int:
        """Return the output as if nothing were removed, two copies of hidden states, repairs."""
        down = sum(self.source.parameters[name].nbytes for name in self.down_names)
        return self.checkpoint_bytes + 2 * self.hidden_bytes + (down if self.repairs else 0)


def measured(asked: _Asked) -> Rates:
    """Time the first block that has units, reading, and solving."""
    source, windows, device = asked.source, asked.batch, asked.runtime.device
    tokens_N = len(windows.tokens_NT)
    for block in stream_blocks(source, windows, replace(asked.runtime, batch_windows=tokens_N)):
        if block.units:
            forward, gram = _time_block(block, tokens_N)
            break
        block.advance()
    all_grams = sum(gram_bytes(source, i) for i in {unit.block for unit in source.units})
    tokens = windows.tokens_NT.numel()
    names = source.stored.sources(asked.down_names[-1])
    start = time.perf_counter()
    read = sum(source.read(name).nbytes for name in names)
    reading = time.perf_counter() - start
    panels = lower_panels(torch.eye(_SOLVED, device=device), torch.arange(_SOLVED, device=device))
    factor(panels[-2:])  # warms up; the factor of an identity is itself
    start = _now(device)
    factor(panels)
    return Rates(
        forward * sum(asked.elements) / asked.elements[block.index] / tokens,
        gram * all_grams / gram_bytes(source, block.index) / tokens,
        reading / read,
        (_now(device) - start) / (_SOLVED**3 / 3),
    )


def _time_block(block: StreamedBlock, windows: int) -> tuple[float, float]:
    """Return the seconds of a block for all windows at once, and of its Gram matrices."""
    everything = slice(0, windows)
    block.compute(everything, block.hidden.read(everything).to(block.device))  # warms up
    none_held_out_N = torch.zeros(windows, dtype=torch.bool)
    observations = [Observation(none_held_out_N, unit.ffns) for unit in block.units]
    gram = 0.0

    def add(unit: int, ffn: int, act_RF: Tensor, window_R: Tensor) -> None:
        nonlocal gram
        start = _now(block.device)
        observations[unit].add(ffn, act_RF, window_R)
        gram += _now(block.device) - start

    start = _now(block.device)
    observe(block, add)
    return _now(block.device) - start - gram, gram


def _now(device: torch.device) -> float:
    """Return the time when the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def announce(source: WeightSource, settings: PruneSettings) -> None:
    """Say what a pruning will come to, and where it is worth little."""
    if (size := size_after(source, settings)) is not None:
        before = parameter_count(source)
        log.info(
            f"{before / 1e6:,.1f}M parameters -> about {size[0] / 1e6:,.1f}M "
            f"({size[0] / before - 1:+.1%}), {size[1] / 1e9:.2f} GB of weights"
        )
    for doubt in doubts(source, settings):
        log.warning("%s", doubt)


def size_after(source: WeightSource, settings: PruneSettings) -> tuple[int, int] | None:
    """Return parameters and bytes of what is left, before widths are rounded to multiples.

    None where only the work says how much goes.
    """
    before, budget, goal = parameter_count(source), settings.budget, settings.goal
    if isinstance(goal, TargetParameters):
        after = round(before * goal.fraction)
    elif goal is None and budget.sparsity and "experts" not in budget.parts:
        after = before - round(_parameters_to_go(source, budget))
    else:
        return None
    stored = sum(spec.nbytes for spec in source.specs.values())
    return after, round(stored * after / before)


def _parameters_to_go(source: WeightSource, budget: Budget) -> float:
    """Return how many parameters go with a share of one part."""
    if budget.whole_parts:
        return budget.sparsity * DropSizes.of(source, budget.whole_parts).total
    return budget.sparsity * parameters_of_channels(source, budget.channel_parts)


def doubts(source: WeightSource, settings: PruneSettings) -> Iterator[str]:
    """Yield a sentence for each reason why pruning like this may be worth little."""
    budget, asked, every = settings.budget, settings.budget.sparsity, parameter_count(source)
    if settings.goal is None and "ffn" in budget.parts:
        gone = _parameters_to_go(source, budget)
        if gone < _LITTLE * asked * every:
            yield (
                f"{asked:.0%} of the {channels_in_words(budget.parts)} are {gone / every:.1%} of "
                f"this model's parameters ({gone / 1e6:,.1f}M of {every / 1e6:,.1f}M), most of "
                "which are elsewhere, as in its vocabulary; for a smaller model give "
                f"--target-params {1 - asked:.2g}, name more --parts, or quantise it"
            )
    size = size_after(source, settings)
    if size is not None and every < _SMALL and size[0] < (1 - _HARMLESS) * every:
        yield (
            f"a model of {every / 1e6:,.0f}M parameters has little to spare: it loses about twice "
            "as much as one of 500M; 8-bit weights cost less, and `cfsp recover` wins back some "
            "of it"
        )
    windows = settings.text.windows
    if settings.repair != "none" and windows < _FEW_WINDOWS:
        yield (
            f"{windows} windows calibrate and repair, by default {DEFAULT_SAMPLES}: "
            "SmolLM2-135M without a fifth of its channels had 1.45 times the dense perplexity by 8 "
            "windows, 1.33 by 16, 1.30 by 32 and 1.27 by 128"
        )

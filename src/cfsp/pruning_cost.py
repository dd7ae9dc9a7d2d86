"""What a prune will take, before it starts: memory, disk, bytes read, arithmetic and time.

Sizes and arithmetic follow from shapes (docs/SCALE.md has the formulas). For the time one block of
the model computes one batch of random tokens, and everything else is taken to be proportional.

Shapes: N windows, T tokens, D hidden, F FFN channels, K channels that stay.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cfsp.calibration.calibrate import observe
from cfsp.checkpoint.reading import parameter_count
from cfsp.checkpoint.stored_blocks import parameters_within
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.decide import COARSE_WINDOWS
from cfsp.engine.block_stream import StreamedBlock, stream_blocks, windows_in_batch
from cfsp.engine.memory import available_bytes, default_budget
from cfsp.engine.whole import needed_bytes
from cfsp.repair.observation import Observation
from cfsp.repair.ridge import LAMBDAS
from cfsp.repair.ridge_pass import gram_bytes
from cfsp.selection.constraint import parameters_to_go
from cfsp.selection.divergence import (
    BEGINNING_TOKENS,
    POSITION_STRIDE,
    prediction_bytes,
    windows_compared,
)
from cfsp.selection.sensitivity import follow_sensitivity
from cfsp.settings import DEFAULT_SAMPLES
from cfsp.speed.work import work_of
from cfsp.speed.workload import Workload
from cfsp.text.pools import sources_drawn
from cfsp.text.windows import Windows

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.settings import PruneSettings

# Python, torch and transformers.
_INTERPRETER_BYTES = int(0.5e9)
# Of a tokenizer, for each entry of its vocabulary.
_TOKEN_BYTES = 1000
# Size of the matrix that the speed of the solve is measured with.
_SOLVED = 1024


@dataclass(frozen=True)
class Stage:
    """One part of a prune.

    Attributes:
        name: of the pass over the blocks, or what else is done.
        flop: arithmetic, a product and a sum being two.
        read_bytes: of the checkpoint.
        seconds: estimated.
    """

    name: str
    flop: float
    read_bytes: int
    seconds: float


@dataclass(frozen=True)
class PruningCost:
    """What a prune will take.

    Attributes:
        stages: its parts in order.
        memory_bytes: the most that is in memory at a time.
        memory_available: what can be had now.
        disk_bytes: what is written beside the output and into it, at most.
        disk_available: free where the output goes.
        parameters_before: of the model.
        parameters_after: of what is left, before widths are rounded to multiples.
        bytes_after: of its weights on disk.
        measured_tokens: that one block was timed with.
    """

    stages: tuple[Stage, ...]
    memory_bytes: int
    memory_available: int
    disk_bytes: int
    disk_available: int
    parameters_before: int
    parameters_after: int
    bytes_after: int
    measured_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return JSON types, with the sums over all stages."""
        stages = [{**asdict(stage), "seconds": round(stage.seconds, 1)} for stage in self.stages]
        return {
            **vars(self),
            "stages": stages,
            "flop": sum(stage.flop for stage in self.stages),
            "read_bytes": sum(stage.read_bytes for stage in self.stages),
            "seconds": round(sum(stage.seconds for stage in self.stages), 1),
        }


@dataclass(frozen=True)
class _Measured:
    """Seconds of one block, scaled up to all blocks of the model.

    Attributes:
        forward: for one token through all blocks, with the sums of a calibration.
        gram: for the Gram matrices of one token in all blocks.
        read: for one byte of the checkpoint.
        solve: for one float64 operation of the solve.
        tokens: that were timed.
    """

    forward: float
    gram: float
    read: float
    solve: float
    tokens: int


def pruning_cost(
    source: WeightSource, out: Path, settings: PruneSettings, engine: Engine
) -> PruningCost:
    """Return what a prune will take; one block is read and computes one batch.

    Args:
        source: the model.
        out: where the smaller model is to go, or a directory on the same disk; need not exist.
        settings: how to prune, without local repair; a text with fewer windows than asked for is
            not noticed.
        engine: where and in what to compute.

    Raises:
        CfspError: the block cannot be read, or does not compute.
    """
    settings = settings.suited_to_repair()
    measured = _measure(source, settings, engine)
    stages = _stages(source, settings, engine, measured)
    out = out.absolute()
    place = next(path for path in (out, *out.parents) if path.exists())
    before = parameter_count(source)
    after = before - round(parameters_to_go(source, settings.budget))
    return PruningCost(
        tuple(stages),
        _memory_bytes(source, settings, engine),
        available_bytes(),
        _disk_bytes(source, settings, engine),
        shutil.disk_usage(place).free,
        before,
        after,
        round(_stored_bytes(source) * after / before),
        measured.tokens,
    )


def _windows(settings: PruneSettings) -> int:
    return DEFAULT_SAMPLES if settings.text.samples is None else settings.text.samples


def _random_windows(source: WeightSource, settings: PruneSettings, engine: Engine) -> Windows:
    """Return one batch of random tokens."""
    one = torch.zeros(1, settings.text.seqlen, dtype=torch.int64)
    size = min(_windows(settings), windows_in_batch(Windows(one, {}), engine.batch_windows))
    shape, generator = (size, settings.text.seqlen), torch.Generator().manual_seed(0)
    tokens_NT = torch.randint(vocabulary_of(source.config), shape, generator=generator)
    return Windows(tokens_NT, {"random tokens": size})


def _measure(source: WeightSource, settings: PruneSettings, engine: Engine) -> _Measured:
    windows = _random_windows(source, settings, engine)
    together = replace(engine, batch_windows=len(windows.tokens_NT))
    for block in stream_blocks(source, windows, together):
        if not block.units:
            block.advance()
            continue
        forward, gram = _time_block(block, windows)
        index = block.index
        break
    all_elements = sum(_block_elements(source, i) for i in range(source.architecture.block_count))
    all_grams = sum(gram_bytes(source, i) for i in {unit.block for unit in source.units})
    tokens = windows.tokens_NT.numel()
    return _Measured(
        forward * all_elements / _block_elements(source, index) / tokens,
        gram * all_grams / gram_bytes(source, index) / tokens,
        _time_reading(source),
        _time_solving(engine.device),
        tokens,
    )


def _time_block(block: StreamedBlock, windows: Windows) -> tuple[float, float]:
    """Return the seconds of a block for all windows at once, and of its Gram matrices."""
    everything = slice(0, len(windows.tokens_NT))
    block.compute(everything, block.hidden.read(everything).to(block.device))  # warms up
    none_held_out_N = torch.zeros(len(windows.tokens_NT), dtype=torch.bool)
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


def _down_names(source: WeightSource) -> list[str]:
    return [source.architecture.block_prefix(u.block) + u.down for u in source.units]


def _time_reading(source: WeightSource) -> float:
    """Return the seconds for one byte, from the last FFN unit."""
    names = source.stored.sources(_down_names(source)[-1])
    start = time.perf_counter()
    nbytes = sum(source.read(name).nbytes for name in names)
    return (time.perf_counter() - start) / nbytes


def _time_solving(device: torch.device) -> float:
    matrix = torch.eye(_SOLVED, dtype=torch.float64, device=device)
    solved = partial(torch.linalg.cholesky_ex, matrix)
    solved()
    start = _now(device)
    solved()
    return (_now(device) - start) / (_SOLVED**3 / 3)


def _block_elements(source: WeightSource, block: int) -> int:
    return parameters_within(source, source.architecture.block_prefix(block))


def _stored_bytes(source: WeightSource) -> int:
    return sum(spec.nbytes for spec in source.specs.values())


def _stages(
    source: WeightSource, settings: PruneSettings, engine: Engine, measured: _Measured
) -> list[Stage]:
    """Return the parts of a prune; a pass takes the longer of computing and reading."""
    work = work_of(source, head=False, itemsize=engine.dtype.itemsize)
    windows, seqlen = _windows(settings), settings.text.seqlen
    stays = 1 - settings.budget.sparsity
    checkpoint = _stored_bytes(source)

    def one_pass(name: str, count: float, gram: float = 0.0) -> Stage:
        """A pass of so many windows, with Gram matrices of a share of their full size."""
        tokens = count * seqlen
        forward = work.prefill_flops(Workload(1, seqlen, 1)) * count
        squares = sum(
            unit.columns**2 * _seen(unit.ffns, work.routed_share) for unit in source.units
        )
        compute = tokens * (measured.forward + gram * measured.gram)
        return Stage(
            name,
            forward + gram * 1.25 * squares * tokens,
            checkpoint,
            max(compute, checkpoint * measured.read),
        )

    def solve(name: str, stays: float) -> Stage:
        hidden = text_config_of(source.config).hidden_size
        flop = sum(
            unit.ffns * _solve_flop(round(unit.columns * stays), unit.columns, hidden)
            for unit in source.units
        )
        flop *= len(LAMBDAS)
        return Stage(name, flop, 0, flop * measured.solve)

    stages = []
    if settings.repair == "none":
        stages.append(one_pass("calibrate", windows))
    else:
        stages.append(one_pass("coarse pass", min(windows, COARSE_WINDOWS)))
    if follow_sensitivity(source, settings.criterion, engine, has_images=False):
        # Half a forward pass of the whole model for each part of each block.
        sources = sources_drawn(settings.text.names, windows)
        tokens = min(windows, windows_compared(sources)) * min(seqlen, BEGINNING_TOKENS)
        places = len({(unit.block, unit.part) for unit in source.units})
        # The head sees some positions, each time.
        head = vocabulary_of(source.config) * text_config_of(source.config).hidden_size
        blocks = sum(_block_elements(source, i) for i in range(source.architecture.block_count))
        passes = 1 + places / 2 + (1 + places) * head / blocks / POSITION_STRIDE
        stages.append(one_pass("sensitivity", tokens / seqlen * passes))
    if settings.repair != "none":
        stages += [one_pass("ridge", windows, 1.0), solve("solve", stays)]
    stages.append(Stage("cut", 0.0, checkpoint, 2 * checkpoint * measured.read))
    return stages


def _seen(ffns: int, routed_share: float) -> float:
    """Return how many FFNs of a unit a token passes."""
    return ffns * routed_share if ffns > 1 else 1.0


def _solve_flop(kept: int, width: int, hidden: int) -> float:
    factor = kept**3 / 3
    return factor + 2.0 * hidden * kept**2 + 2.0 * hidden * kept * (width - kept)


def _hidden_bytes(source: WeightSource, settings: PruneSettings, engine: Engine) -> int:
    hidden = int(text_config_of(source.config).hidden_size)
    tokens = _windows(settings) * settings.text.seqlen
    return tokens * hidden * engine.dtype.itemsize


def _memory_bytes(source: WeightSource, settings: PruneSettings, engine: Engine) -> int:
    """Return the peak, as docs/SCALE.md works it out."""
    hidden_size, itemsize = int(text_config_of(source.config).hidden_size), engine.dtype.itemsize
    vocabulary = vocabulary_of(source.config)
    elements = [_block_elements(source, i) for i in range(source.architecture.block_count)]
    around = (parameter_count(source) - sum(elements)) * itemsize
    block = max(elements) * itemsize
    width = max(unit.columns for unit in source.units)
    batch = _random_windows(source, settings, engine).tokens_NT.numel()
    activations = batch * (6 * width + 24 * hidden_size)
    peak = max(around + block, 2 * block + activations)
    if settings.repair != "none":
        gram = max(gram_bytes(source, index) for index in {unit.block for unit in source.units})
        kept = round(width * (1 - settings.budget.sparsity))
        system = max(4 * kept**2, 10 * hidden_size * width)
        peak = max(peak, 2 * block + activations + gram, block + gram + system)
    hidden = _hidden_bytes(source, settings, engine)
    peak += hidden if hidden <= _budget(settings) else 0
    if follow_sensitivity(source, settings.criterion, engine, has_images=False):
        peak = max(peak, needed_bytes(source, engine.dtype) + prediction_bytes(vocabulary))
    return peak + _INTERPRETER_BYTES + _TOKEN_BYTES * vocabulary


def _budget(settings: PruneSettings) -> int:
    budget = settings.compute.memory_budget
    return default_budget() if budget is None else budget


def _disk_bytes(source: WeightSource, settings: PruneSettings, engine: Engine) -> int:
    """Return the output as if nothing were removed, two copies of hidden states, and repairs."""
    steps = {"none": 0, "ridge": 1, "sequential": 2}[settings.repair]
    repaired = steps * sum(source.parameters[name].nbytes for name in _down_names(source))
    return _stored_bytes(source) + 2 * _hidden_bytes(source, settings, engine) + repaired

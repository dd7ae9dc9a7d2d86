"""What is said before any work: what a prune takes, how small the model becomes, and doubts.

Sizes and work follow from shapes (docs/SCALE.md has the formulas), the time of the work from that
of a product of two matrices here and now.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional

from cfsp.architecture.found import Unit
from cfsp.architecture.model_classes import model_class_of
from cfsp.checkpoint.reading import WeightSource
from cfsp.checkpoint.stored_blocks import parameters_of_blocks
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.planning.allocation import allocate
from cfsp.planning.importance import COARSE_WINDOWS
from cfsp.planning.make import model_size, parameters_of_channels
from cfsp.repair.ridge_pass import gram_bytes
from cfsp.result.tables import human_bytes, human_count
from cfsp.selection.constraint import Share
from cfsp.selection.divergence import (
    BEGINNING_TOKENS,
    LEAST_WINDOWS,
    POSITION_STRIDE,
    follow_sensitivity,
    prediction_bytes,
)
from cfsp.settings import DEFAULT_SAMPLES, Budget, PruneSettings, TargetParameters
from cfsp.streaming.block_stream import windows_in_batch
from cfsp.streaming.memory import available_bytes, hidden_budget
from cfsp.streaming.runtime import Runtime, fits, needed_bytes, runtime_of
from cfsp.text.drawing import parts_with_shares
from cfsp.text.windows import Windows, is_held_out

_INTERPRETER_BYTES = int(0.5e9)  # Python, torch and transformers
_TOKEN_BYTES = 1000  # of a tokenizer, for each entry of its vocabulary
# So many strengths of the ridge are tried where the middle one or a stronger one is best.
_STRENGTHS = 3
_SIDE = 1024  # of the matrices that tell how fast this machine is
# Of the share that was asked for, which goes of the model where most of it is elsewhere.
_LITTLE = 1 / 3
# Below so many parameters a model lost about twice as much: without 20% of their channels
# SmolLM2-135M has 1.27 times the perplexity and Qwen2.5-Coder-0.5B 1.15 (docs/RESULTS.md).
_SMALL = 300e6
_HARMLESS = 0.05  # of a small model, which goes without a word
_FEW_WINDOWS = 64  # fewer windows repair less well (docs/RESULTS.md, foreign text)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningCost:
    """What a prune will take, and what it will leave."""

    memory_bytes: int  # the most at a time
    memory_available: int
    disk_bytes: int  # beside the output and into it, at most
    disk_available: int
    parameters_before: int
    parameters_after: int  # to within a multiple
    weight_bytes_after: int
    flop: float | None  # of all matrix products; None where experts see some of the tokens
    seconds: float | None  # of these, at the speed of this machine: the run takes longer


def pruning_cost(source: WeightSource, out: Path, settings: PruneSettings) -> PruningCost:
    """Return what a prune will take; hardly a weight is read.

    `out` is where the smaller model is to go, or a directory on the same disk; it need not exist.
    The settings are without sequential repair; a text with fewer windows than asked
    for is not noticed.
    """
    settings, runtime = settings.suited_to_repair(), runtime_of(settings.compute, source)
    tokens = settings.text.windows * settings.text.seqlen
    hidden_bytes = tokens * text_config_of(source.config).hidden_size * runtime.dtype.itemsize
    # As if nothing were removed, repairs, and hidden states as they were saved last and before
    # that; beyond the budget they are themselves on disk.
    copies = 2 if hidden_bytes <= hidden_budget(settings.compute.memory_budget) else 3
    disk_bytes = source.nbytes + copies * hidden_bytes
    if settings.repairs:
        prefix = source.architecture.block_prefix
        names = [prefix(unit.block) + unit.down for unit in source.units]
        disk_bytes += sum(source.parameters[name].nbytes for name in names)
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    before, elements = source.parameter_count, parameters_of_blocks(source)
    routed = source.architecture.has_experts
    work = None if routed else _work(source, settings, runtime, sum(elements))
    return PruningCost(
        _memory_bytes(source, settings, runtime, hidden_bytes, elements),
        available_bytes(),
        disk_bytes,
        shutil.disk_usage(existing).free,
        before,
        *(size_after(source, settings) or (before, source.nbytes)),
        sum(work.values()) if work else None,
        sum(n / _speed(dtype, runtime.device) for dtype, n in work.items()) if work else None,
    )


def _work(
    source: WeightSource, settings: PruneSettings, runtime: Runtime, elements: int
) -> dict[torch.dtype, float]:
    """Return the floating-point operations of all matrix products, by their dtype."""
    text, repairs = settings.text, settings.repairs
    hidden = int(text_config_of(source.config).hidden_size)
    vocabulary = vocabulary_of(source.config)
    token = 2.0 * elements
    windows = text.windows + (min(text.windows, COARSE_WINDOWS) if repairs else 0)
    work = {runtime.dtype: token * windows * text.seqlen}
    if follow_sensitivity(settings.criterion, partial(fits, source, runtime)):
        places = len({(unit.block, unit.part) for unit in source.units})
        texts = sum(share > 0 for _, share in parts_with_shares(text.names, text.windows))
        compared = min(text.windows, max(LEAST_WINDOWS, texts))
        # The dense model, and from its block on the model without each place; then the head.
        head = 2.0 * vocabulary * hidden / POSITION_STRIDE
        each = token * (1 + places / 2) + head * (1 + places)
        work[runtime.dtype] += each * compared * min(text.seqlen, BEGINNING_TOKENS)
    if repairs:
        narrowed = _narrowed(source, settings.budget)
        gram = sum(1.25 * unit.columns**2 for unit in narrowed)
        work[torch.float32] = work.get(torch.float32, 0.0) + gram * text.windows * text.seqlen
        kept_U = [round(unit.columns * (1 - settings.budget.sparsity)) for unit in narrowed]
        solves = (kept**3 / 3 + 2.0 * hidden * kept**2 for kept in kept_U)
        work[torch.float64] = _STRENGTHS * sum(solves)
    return work


def _narrowed(source: WeightSource, budget: Budget) -> list[Unit]:
    """Return the units that may lose some of their channels."""
    return [unit for unit in source.units if unit.part in budget.channel_parts]


def _speed(dtype: torch.dtype, device: torch.device) -> float:
    """Return the operations a second of a matrix product, on this machine now."""
    side = torch.ones(_SIDE, _SIDE, dtype=dtype, device=device)
    seconds = []
    for _ in range(3):  # the first is slow
        start = time.perf_counter()
        # As modules multiply, which is ten times as fast in float16 on a CPU; and waits for it.
        float(functional.linear(side, side)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2.0 * _SIDE**3 / min(seconds)


def _memory_bytes(
    source: WeightSource,
    settings: PruneSettings,
    runtime: Runtime,
    hidden_bytes: int,
    elements: list[int],
) -> int:
    """Return the peak, as docs/SCALE.md works it out, by the weights of each block."""
    text, itemsize = settings.text, runtime.dtype.itemsize
    hidden = int(text_config_of(source.config).hidden_size)
    vocabulary = vocabulary_of(source.config)
    around = (source.parameter_count - sum(elements)) * itemsize
    block, width = max(elements) * itemsize, max(unit.columns for unit in source.units)
    one = Windows(torch.zeros(1, text.seqlen, dtype=torch.int64), {})
    batch = min(text.windows, windows_in_batch(one, runtime.batch_windows))
    activations = batch * text.seqlen * (6 * width + 24 * hidden)
    config, model_class = text_config_of(source.config), model_class_of(source.config)
    if not model_class._supports_sdpa:  # it computes every score of every head, a few times over
        activations += 12 * batch * config.num_attention_heads * text.seqlen**2
    peak = max(around + block, 2 * block + activations)
    if narrowed := settings.repairs and _narrowed(source, settings.budget):
        width = max(unit.columns for unit in narrowed)
        gram = max(gram_bytes(narrowed).values())
        kept = round(width * (1 - settings.budget.sparsity))
        system = max(4 * kept**2, 10 * hidden * width)
        shares = [share for _, share in parts_with_shares(text.names, text.windows)]
        tokens = int(is_held_out(shares).sum()) * text.seqlen
        held_out = tokens * width * itemsize
        # What is kept of them, and what they should give, which is put together from its parts.
        judged = tokens * (kept * itemsize + 8 * hidden)
        peak = max(
            peak,
            2 * block + activations + gram + held_out,
            block + gram + system + held_out + judged,
        )
    budget = settings.compute.memory_budget
    peak += hidden_bytes if hidden_bytes <= hidden_budget(budget) else 0
    # What Gemma 3n and 4 make of each token for each of their blocks stays in memory.
    of_token = getattr(config, "hidden_size_per_layer_input", None) or 0
    peak += text.windows * text.seqlen * of_token * len(elements) * itemsize
    if follow_sensitivity(settings.criterion, partial(fits, source, runtime)):
        peak = max(peak, needed_bytes(source, runtime.dtype) + prediction_bytes(vocabulary))
    return peak + _INTERPRETER_BYTES + _TOKEN_BYTES * vocabulary


def announce(source: WeightSource, settings: PruneSettings) -> None:
    """Say what size a pruning will come to."""
    if (size := size_after(source, settings)) is not None:
        before = source.parameter_count
        log.info(
            f"{human_count(before)} parameters -> about {human_count(size[0])} "
            f"({size[0] / before - 1:+.1%}), {human_bytes(size[1])} of weights"
        )


def say_doubts(found: Iterable[str]) -> None:
    """Say why a pruning, or several, may be worth little: each doubt once."""
    for doubt in dict.fromkeys(found):
        log.warning("%s", doubt)


def size_after(source: WeightSource, settings: PruneSettings) -> tuple[int, int] | None:
    """Return parameters and bytes that are left, to within a multiple; None if only the work says.

    Of blocks of several sizes it is as if the first went.
    """
    before, budget, goal = source.parameter_count, settings.budget, settings.goal
    if isinstance(goal, TargetParameters):
        after = round(before * goal.fraction)
    elif goal or not (budget.sparsity or budget.remove) or "experts" in budget.parts:
        return None
    elif budget.whole_part:
        wanted = Share(source, budget).to_drop()
        after = before - wanted.sizes.parameters(wanted.taken(wanted.sizes.size_of))
    else:
        size = model_size(source, budget)
        after = size.parameters_with(allocate([1.0] * len(size.units), budget, size))
    return after, round(source.nbytes * after / before)


def doubts(
    source: WeightSource, settings: PruneSettings, windows: int | None = None
) -> Iterator[str]:
    """Yield a sentence for each reason why pruning like this may be worth little.

    A text may give fewer windows than were asked for; None where it was not read.
    """
    budget, asked, every = settings.budget, settings.budget.sparsity, source.parameter_count
    if settings.goal is None and "ffn" in budget.parts:
        gone = asked * parameters_of_channels(source, budget.channel_parts)
        if gone < _LITTLE * asked * every:
            yield (
                f"{asked:.0%} of the FFN channels are {gone / every:.1%} of this model's "
                f"parameters ({gone / 1e6:,.1f}M of {every / 1e6:,.1f}M), most of which are "
                "elsewhere, as in its vocabulary; for a smaller model give "
                f"--target-params {1 - asked:.2g}, name more --parts, or quantise it"
            )
    size = size_after(source, settings)
    if size is not None and every < _SMALL and size[0] < (1 - _HARMLESS) * every:
        yield (
            f"a model of {human_count(every)} parameters has little to spare: it loses about twice "
            "as much as one of 500M; 8-bit weights cost less, and `cfsp recover` wins back some "
            "of it"
        )
    windows = settings.text.windows if windows is None else windows
    if settings.repairs and windows < _FEW_WINDOWS:
        yield (
            f"{windows} windows calibrate and repair, by default {DEFAULT_SAMPLES}: "
            "SmolLM2-135M without a fifth of its channels had 1.45 times the dense perplexity by 8 "
            "windows, 1.33 by 16, 1.30 by 32 and 1.27 by 128"
        )

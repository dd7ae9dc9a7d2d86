"""Perplexity of a model that need not fit into memory: its windows stream through the blocks.

All windows pass block by block. What leaves the last one goes through the model's own norm and
head, some positions at a time, so that the logits of a large vocabulary take little memory.

Shapes: N windows, B windows in a batch, T tokens, P positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cfsp.calibration.calibrate import check_tokens
from cfsp.checkpoint.output import write_atomically
from cfsp.checkpoint.text_config import text_config_of, vocabulary_of
from cfsp.engine.block_pass import pass_blocks
from cfsp.engine.block_stream import StreamedBlock
from cfsp.engine.head import Head
from cfsp.quality.perplexity import Perplexity, negative_log_likelihood, perplexity_of

if TYPE_CHECKING:
    from cfsp.checkpoint.reading import WeightSource
    from cfsp.engine.compute import Engine
    from cfsp.engine.workplace import Workplace
    from cfsp.text.windows import Windows

# Enough positions for a fast product with the head, where the vocabulary is not huge.
LOGITS_AT_ONCE = 1 << 25


def streamed_perplexity(
    source: WeightSource,
    windows: Windows,
    engine: Engine,
    *,
    place: Workplace | None = None,
    name: str = "perplexity",
    label: str | None = None,
) -> Perplexity:
    """Measure the perplexity of a model, with two of its blocks in memory at a time.

    Logits are in the dtype that the model computes in, their log-softmax is in float32.

    Args:
        source: the model.
        windows: token windows without padding.
        engine: where and in what to compute.
        place: where to spill and to save; None for neither.
        name: of the pass, in its workplace.
        label: what people read of it; None for its name.

    Raises:
        CalibrationError: token ids exceed the vocabulary, or the loss is NaN.
        ResumeError: the workplace holds unfinished work of something else.
    """
    label = label or name
    check_tokens(source.config, windows.tokens_NT, label)
    blocks = source.architecture.block_count
    head_tokens = _head_tokens(source)

    def visit(block: StreamedBlock) -> float | None:
        if block.index + 1 < blocks:
            block.advance()
            return None
        loss = _Loss(Head(source, engine.device, engine.dtype), windows, block, head_tokens)
        block.advance(on_hidden=loss.add)
        return loss.total

    found = pass_blocks(
        source,
        windows,
        visit,
        _LossFile(),
        name=name,
        device=engine.device,
        dtype=engine.dtype,
        batch_windows=engine.batch_windows,
        place=place,
        label=label,
        more_tokens=int(head_tokens * int(windows.scored_N.sum())),
    )
    assert found[-1] is not None
    return perplexity_of(found[-1], windows, label)


def _head_tokens(source: WeightSource) -> float:
    """Return how many passes of a token through a block one through the head is worth."""
    stored = source.stored.within(f"{source.architecture.blocks}.")
    blocks = sum(source.specs[name].elements for name in stored)
    block = blocks / source.architecture.block_count
    return float(vocabulary_of(source.config) * text_config_of(source.config).hidden_size / block)


@dataclass
class _Loss:
    """Adds up the loss of windows while they leave the last block, in their order.

    Attributes:
        total: nats, of all windows so far.
    """

    head: Head
    windows: Windows
    block: StreamedBlock
    head_tokens: float
    total: float = 0.0
    _done: int = 0

    def add(self, input_BTD: Tensor, output_BTD: Tensor) -> None:
        """Add a batch."""
        for hidden_TD in output_BTD:
            tokens_T = self.windows.tokens_NT[self._done].to(hidden_TD.device)
            count = int(self.windows.scored_N[self._done])
            self._add(hidden_TD[-count - 1 : -1], tokens_T[-count:])
            self._done += 1

    def _add(self, hidden_PD: Tensor, next_P: Tensor) -> None:
        size = max(1, LOGITS_AT_ONCE // self.head.vocabulary)
        for some_PD, some_P in zip(
            torch.split(hidden_PD, size), torch.split(next_P, size), strict=True
        ):
            self.total += negative_log_likelihood(self.head.logits(some_PD), some_P)
            self.block.tokens_done(int(self.head_tokens * len(some_P)))


class _LossFile:
    """Keeps the loss, which the last block gives; the others give nothing."""

    def save(self, result: float | None, directory: Path, block: int) -> None:
        """Write the loss."""
        write_atomically(directory / f"loss-{block}.json", json.dumps(result).encode())

    def load(self, directory: Path, block: int) -> float | None:
        """Read it."""
        found: float | None = json.loads((directory / f"loss-{block}.json").read_text("utf-8"))
        return found
